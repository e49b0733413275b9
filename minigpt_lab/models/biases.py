"""Biases that pruning adds to linear layers whose architecture has none there."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from .anatomy import Anatomy, weight_axis


def give_bias(module: nn.Module) -> None:
    """Give a linear layer a bias of zeros, and mark it as one that its architecture lacks."""
    outputs = module.weight.shape[weight_axis(module, "output")]
    zeros = module.weight.new_zeros(outputs)
    module.bias = nn.Parameter(zeros, requires_grad=module.weight.requires_grad)
    module.given_bias = True


def take_bias(module: nn.Module) -> None:
    """Undo `give_bias`."""
    module.bias = None
    del module.given_bias


def given_parameters(model: PreTrainedModel) -> int:
    """Parameters in biases that `give_bias` added."""
    linears = (module for _, _, module in Anatomy(model).linears())
    return sum(module.bias.numel() for module in linears if hasattr(module, "given_bias"))
