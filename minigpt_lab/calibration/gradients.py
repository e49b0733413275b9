"""Gradients of the language-model loss, one window of text at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from ..checks import (
    Batches,
    Flag,
    Model,
    checked,
    hooked,
    invalid,
    restore_on_exit,
    safe_contextmanager,
    suggest,
)
from ..domains import unpadded
from ..models import Anatomy, check_token_ids, inference

_BLOCK = 256  # tokens whose logits exist at once


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


def window_losses(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood of each window's tokens ``[window]``, in float32.

    The logits of a few tokens exist at a time: all of them would take more memory than the model's
    own forward pass. A model's soft cap of logits is applied.

    Parameters
    ----------
    ids : torch.Tensor
        ``[window, token]`` without padding.
    """
    check_token_ids(model, ids)
    ids = ids.to(model.device)
    hidden = model.base_model(input_ids=ids, use_cache=False)[0][:, :-1].flatten(0, 1)
    head, targets = model.get_output_embeddings(), ids[:, 1:].flatten()
    cap = Anatomy(model).soft_cap()
    losses = [
        functional.cross_entropy(_capped(head(x).float(), cap), y, reduction="none")
        for x, y in zip(hidden.split(_BLOCK), targets.split(_BLOCK), strict=True)
    ]
    return torch.cat(losses).view(len(ids), -1).mean(1)


def _capped(logits: torch.Tensor, cap: float | None) -> torch.Tensor:
    return logits if cap is None else torch.tanh(logits / cap) * cap


@checked(model=Model(), batches=Batches(), squares=Flag(), gradient_checkpointing=Flag())
def collect_gradients(
    model: PreTrainedModel,
    batches: Iterable[dict[str, torch.Tensor]],
    names: Iterable[str],
    *,
    squares: bool = False,
    gradient_checkpointing: bool = False,
) -> Gradients:
    """Backpropagate through one window after another, and keep the mean.

    Every window weighs the same, however long. Besides the means (and squares), memory holds one
    window's activations and one layer's gradient.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A supported causal language model; left as it was, its own gradients too.
    batches : iterable of dict
        Calibration tokens; padding is left out.
    names : iterable of str
        Full names of the linear layers.
    squares : bool
        Keep the mean of the squares besides.
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
    mean, square = (
        {name: torch.zeros_like(m.weight, dtype=torch.float32) for name, m in modules.items()}
        if wanted
        else {}
        for wanted in (True, squares)
    )

    def keep(name: str, weight: nn.Parameter) -> None:
        gradient, weight.grad = weight.grad.float(), None
        mean[name] += gradient
        if squares:
            square[name].addcmul_(gradient, gradient)

    n_windows = 0
    layers = Anatomy(model).layers if gradient_checkpointing else []
    with _gradients_of(model, modules, keep, layers):
        for ids in unpadded(batches):
            for window in ids.split(1):
                loss = window_losses(model, window).sum()
                if not torch.isfinite(loss):
                    refuse_non_finite(model, window)
                loss.backward()
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
        For a name that is none of them.
    """
    known = {name: module for _, name, module in Anatomy(model).linears()}
    wanted = [*names] if isinstance(names, Iterable) and not isinstance(names, str) else [names]
    for name in wanted or [None]:
        if not isinstance(name, str) or name not in known:
            expected = "full names of linear layers of the decoder"
            raise invalid("names", name, expected, suggest(str(name), known))
    return {name: known[name] for name in wanted}


@safe_contextmanager
def _gradients_of(
    model: PreTrainedModel,
    modules: Mapping[str, nn.Module],
    keep: Callable[[str, nn.Parameter], None],
    checkpointed: Iterable[nn.Module],
) -> Iterator[None]:
    """Evaluation mode in which just these weights have gradients, handed over one by one."""
    with restore_on_exit(model), inference(model), torch.enable_grad():
        for parameter in model.parameters():
            parameter.requires_grad_(False)
            parameter.grad = None
        registrations = []
        for name, module in modules.items():
            register = module.weight.requires_grad_(True).register_post_accumulate_grad_hook
            registrations.append(partial(register, partial(keep, name)))
        for layer in checkpointed:  # transformers' own needs training mode, and so dropout
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        with hooked(*registrations):
            yield


def refuse_non_finite(model: PreTrainedModel, ids: torch.Tensor) -> None:
    """Raise a ValueError that names the first linear layer with NaN or infinite values.

    Parameters
    ----------
    ids : torch.Tensor
        Windows ``[window, token]`` whose loss is not finite.
    """

    def hook(name: str, _module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        for side, tensor in (("input", args[0]), ("output", output)):
            if not torch.isfinite(tensor).all():
                raise ValueError(f"{name} has NaN or infinite values at its {side}")

    linears = Anatomy(model).linears()
    hooks = [
        partial(module.register_forward_hook, partial(hook, name)) for _, name, module in linears
    ]
    with torch.no_grad(), hooked(*hooks):
        model.base_model(input_ids=ids.to(model.device), use_cache=False)
    raise ValueError("the loss is NaN or infinite: check the norms, the embedding and the head")
