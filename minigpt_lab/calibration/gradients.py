"""Gradients of the language-model loss, one window of text at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from ..checks import (
    Batches,
    Flag,
    InvalidArgument,
    ListOf,
    Model,
    Text,
    checked,
    hooked,
    restore_on_exit,
    safe_contextmanager,
    suggest,
)
from ..domains import unpadded
from ..models import Anatomy, inference
from .forward import patched_forward
from .losses import window_losses

NAMES = ListOf(Text(), 1)


@dataclass(frozen=True)
class Gradients:
    """Derivatives of the mean loss of some windows with respect to linear layers' weights.

    Parameters
    ----------
    mean : dict
        Linear layer's name to ``dL/dW``, the mean over windows, in float32.
    square : dict
        Name to the mean over windows of the squares (the diagonal of the empirical Fisher matrix);
        empty unless it was asked for.
    n_windows : int
        Windows of text.
    """

    mean: dict[str, torch.Tensor]
    square: dict[str, torch.Tensor]
    n_windows: int

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.mean[name]


@checked(
    model=Model(), batches=Batches(), names=NAMES, squares=Flag(), gradient_checkpointing=Flag()
)
def collect_gradients(
    model: PreTrainedModel,
    batches: Iterable[dict[str, torch.Tensor]],
    names: Iterable[str],
    *,
    squares: bool = False,
    gradient_checkpointing: bool = False,
) -> Gradients:
    """Backpropagate through one window after another and average the weights' gradients.

    Every window weighs the same, however long. Besides the means (and squares), memory holds one
    window's activations and one layer's gradient.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A supported causal language model; unchanged afterwards, its own gradients too.
    batches : iterable of dict
        Calibration tokens; padding is left out.
    names : iterable of str
        Full names of the linear layers.
    squares : bool
        Average the squares of the gradients too.
    gradient_checkpointing : bool
        Keep only the decoder layers' inputs, and compute the rest twice.

    Raises
    ------
    ValueError
        If there are no tokens, or an activation or a gradient is not finite.
    """
    if torch.is_inference_mode_enabled():
        raise ValueError("gradients are asked for inside torch.inference_mode(); call it outside")
    modules = linear_modules(model, names)
    mean = {name: _zeros_like(module.weight) for name, module in modules.items()}
    square = {name: _zeros_like(mean[name]) for name in modules} if squares else {}

    def accumulate(name: str, weight: nn.Parameter) -> None:
        gradient, weight.grad = weight.grad.float(), None
        mean[name] += gradient
        if squares:
            square[name].addcmul_(gradient, gradient)

    n_windows = 0
    layers = Anatomy(model).layers if gradient_checkpointing else []
    with _gradients_of(model, modules, accumulate), patched_forward(layers, _checkpointed):
        for ids in unpadded(batches):
            for window in ids.split(1):
                window_losses(model, window).sum().backward()
                n_windows += 1
    for name in reversed(modules):  # where backpropagation meets it first
        if not torch.isfinite(mean[name]).all():
            raise ValueError(f"{name} has NaN or infinite gradients: check the weights")
    for tensor in (*mean.values(), *square.values()):
        tensor /= n_windows
    return Gradients(mean, square, n_windows)


def linear_modules(model: PreTrainedModel, names: Iterable[str]) -> dict[str, nn.Module]:
    """Linear layers of the decoder by their full names.

    Raises
    ------
    InvalidArgument
        For a name that is none of them, or one without weights.
    """
    linears = {name: module for _, name, module in Anatomy(model).linears()}
    for name in names:
        if name not in linears:
            hint = suggest(name, [*linears])
            raise InvalidArgument(f"names has {name!r}, no linear layer of the decoder; {hint}")
        if not linears[name].weight.numel():
            raise InvalidArgument(
                f"names has {name!r}, which has no weights, as its block was dropped; leave it out"
            )
    return {name: linears[name] for name in names}


def _zeros_like(weight: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(weight, dtype=torch.float32)


def _checkpointed(forward: Callable, *args, **kwargs):
    """A layer's forward that computes its activations again in the backward pass.

    transformers' own gradient checkpointing needs training mode, and so dropout.
    """
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


@safe_contextmanager
def _gradients_of(
    model: PreTrainedModel,
    modules: Mapping[str, nn.Module],
    accumulate: Callable[[str, nn.Parameter], None],
) -> Iterator[None]:
    """Evaluation mode in which only these weights get gradients, handed over one by one."""
    with restore_on_exit(model), inference(model), torch.enable_grad():
        for parameter in model.parameters():
            parameter.requires_grad_(False)
            parameter.grad = None
        registrations = []
        for name, module in modules.items():
            register = module.weight.requires_grad_(True).register_post_accumulate_grad_hook
            registrations.append(partial(register, partial(accumulate, name)))
        with hooked(*registrations):
            yield
