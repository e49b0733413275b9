"""Negative log-likelihoods of tokens and windows."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn import functional
from transformers import PreTrainedModel

from ..models import Anatomy
from .forward import run_decoder, watch

_BLOCK = 256  # tokens whose logits exist at once
#: Logits converted to float32 at once: on a CPU (they fit into its cache), and elsewhere.
_CPU_LOGITS, _GPU_LOGITS = 1 << 22, 1 << 28


def token_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """``-log p(target)`` of every token, in float32.

    The logits are converted to float32 a few tokens at a time.

    Parameters
    ----------
    logits : torch.Tensor
        ``[…, vocabulary]``; those of a position predict the token after it.
    targets : torch.Tensor
        Token ids ``[…]``.
    """
    # flat: twice as fast as with the classes in the middle
    flat, answers = logits.flatten(0, -2), targets.flatten()  # [token, vocabulary], [token]
    losses = [
        functional.cross_entropy(block.float(), answer, reduction="none")
        for block, answer in logit_blocks(flat, answers)
    ]
    return torch.cat(losses).view(targets.shape)


def logit_blocks(logits: torch.Tensor, *others: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Split logits ``[token, vocabulary]``, and tensors as long, into blocks of a few tokens."""
    limit = _CPU_LOGITS if logits.device.type == "cpu" else _GPU_LOGITS
    size = max(1, limit // logits.shape[1])
    return zip(*(tensor.split(size) for tensor in (logits, *others)), strict=True)


def window_losses(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood of each window's tokens ``[window]``, in float32.

    The logits of a few tokens exist at a time: all of them would take more memory than the model's
    own forward pass.

    Parameters
    ----------
    ids : torch.Tensor
        ``[window, token]`` without padding.

    Raises
    ------
    ValueError
        If a loss is not finite; the first linear layer with NaN or infinite values is named.
    """
    head, cap = model.get_output_embeddings(), Anatomy(model).soft_cap()
    hidden = run_decoder(model, ids)[:, :-1].flatten(0, 1)  # [token, feature]
    targets = ids[:, 1:].flatten().to(hidden.device)
    losses = []
    for x, y in zip(hidden.split(_BLOCK), targets.split(_BLOCK), strict=True):
        logits = head(x).float()  # [token, vocabulary]
        losses.append(token_losses(logits if cap is None else torch.tanh(logits / cap) * cap, y))
    found = torch.cat(losses).view(len(ids), -1).mean(1)  # [window]
    if not torch.isfinite(found).all():
        _raise_non_finite(model, ids)
    return found


def _raise_non_finite(model: PreTrainedModel, ids: torch.Tensor) -> None:
    """Raise the error of a loss that is not finite, naming the first layer that is at fault."""

    def check(name: str, x: torch.Tensor, y: torch.Tensor) -> None:
        for side, tensor in (("input", x), ("output", y)):
            if not torch.isfinite(tensor).all():
                raise ValueError(f"{name} has NaN or infinite values at its {side}")

    linears = {name: module for _, name, module in Anatomy(model).linears()}
    with torch.no_grad(), watch(linears, after=check):
        run_decoder(model, ids)
    raise ValueError("the loss is NaN or infinite: check the norms, the embedding and the head")
