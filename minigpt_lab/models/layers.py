"""What a layer must know of itself once it differs from what the model's config says."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from transformers import PretrainedConfig


class LayerConfig:
    """A view of the model's config with a few values of one layer's own.

    Everything else is read from the model's config at every call, so that later changes (of the
    attention implementation, say) reach the layer.
    """

    def __init__(self, shared: PretrainedConfig):
        self.shared = shared

    def __getattr__(self, name: str):
        if name == "shared" or name.startswith("__"):  # asked for while a copy is being made
            raise AttributeError(name)
        return getattr(self.shared, name)


def set_attribute(layer: nn.Module, path: str, value: int) -> None:
    """Set what a forward pass reads; a config on the way there becomes the layer's own view."""
    *parents, name = path.split(".")
    owner = layer
    for parent in parents:
        child = getattr(owner, parent)
        if isinstance(child, PretrainedConfig):
            child = LayerConfig(child)
            setattr(owner, parent, child)
        owner = child
    setattr(owner, name, value)


def own_share(argument: str, layer: nn.Module, args: tuple, kwargs: dict) -> tuple | None:
    """Forward pre-hook: of an argument with an entry per head, only those of the layer's heads.

    The model goes on building the argument for the heads of its config. Which of them a layer
    still has is the buffer ``surviving_heads``; it is saved and loaded with the weights, so that
    heads keep, say, their ALiBi slopes wherever the weights go.
    """
    if layer.surviving_heads is None:
        return None
    whole: torch.Tensor = kwargs[argument]  # [batch * heads, …]
    by_head = whole.unflatten(0, (len(args[0]), -1))
    own = by_head.index_select(1, layer.surviving_heads).flatten(0, 1)
    return args, {**kwargs, argument: own}


def moved(
    tensor: torch.Tensor, axis: int, source: np.ndarray, target: np.ndarray, width: int
) -> nn.Parameter:
    """Copy slices `source` of an axis to places `target` of a new one, zero elsewhere."""
    shape = list(tensor.shape)
    shape[axis] = width
    new = tensor.new_zeros(shape)
    source, target = (torch.as_tensor(index, device=tensor.device) for index in (source, target))
    new.index_copy_(axis, target, tensor.index_select(axis, source))
    return nn.Parameter(new, requires_grad=tensor.requires_grad)
