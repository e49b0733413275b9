"""Losses of several continuations of one prompt, in one pass.

They stand side by side behind the prompt; each sees the prompt and itself, at the positions that it
would have alone. So the prompt is computed once and without a cache, for every architecture that
takes position ids. Others (ALiBi counts from the mask) get one row for every continuation.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..calibration import token_losses
from ..domains import encode, window_prefix
from ..models import check_token_ids


@dataclass(frozen=True)
class Packed:
    """A prompt and its continuations as one row of tokens.

    Parameters
    ----------
    ids : list of int
        The tokens that all continuations share, then each one's own.
    shared : int
        Number of shared tokens.
    branches : tuple of slice
        Each continuation's own tokens in `ids`.
    starts : tuple of int
        The first of them that belongs to the continuation; those before it end the prompt.
    truncated : int
        Tokens removed from the front of the prompt.
    """

    ids: list[int]
    shared: int
    branches: tuple[slice, ...]
    starts: tuple[int, ...]
    truncated: int


def longest(model: PreTrainedModel, seq_len: int | None) -> int:
    """Most tokens that the model and the caller allow in a row."""
    # A sliding window hides the beginning of longer rows, which our mask would not know.
    names = ("max_position_embeddings", "sliding_window")
    limits = [seq_len, *(getattr(model.config, name, None) for name in names)]
    return min((value for value in limits if value is not None), default=1 << 30)


def first_difference(first: Sequence, second: Sequence) -> int:
    """Index of the first place at which two sequences differ; the shorter's length if none does."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def pack(
    prompt: str, continuations: Sequence[str], tokenizer: PreTrainedTokenizerBase, limit: int
) -> Packed:
    """Tokens of a prompt and of what may follow it after a space, truncated from the left.

    Raises
    ------
    ValueError
        If a continuation has no tokens, or the limit leaves none before them.
    """
    begin = window_prefix(tokenizer)
    texts = [prompt, *(f"{prompt} {continuation}" for continuation in continuations)]
    # The space belongs to the continuation, which may also change the prompt's last token: it
    # starts where its tokens part from those of the prompt alone.
    alone, *whole = (encode(text, tokenizer)["input_ids"] for text in texts)
    parts = [first_difference(alone, tokens) for tokens in whole]
    for continuation, part, tokens in zip(continuations, parts, whole, strict=True):
        if part == len(tokens):
            raise ValueError(f"its choice {continuation!r} has no tokens in this tokenizer")
    length, shared = len(begin) + max(map(len, whole)), min(parts)
    truncated = max(0, length - limit)
    if len(begin) + shared - truncated < 1:
        raise ValueError(
            f"no token is left before its choices: {length} tokens with the longest, of which "
            f"{shared} come before, limit {limit}; shorten the choices"
        )
    ids = begin + alone[truncated:shared]
    size, branches, starts = len(ids), [], []
    for part, tokens in zip(parts, whole, strict=True):
        branches.append(slice(len(ids), len(ids) + len(tokens) - shared))
        starts.append(len(ids) + part - shared)
        ids = ids + tokens[shared:]
    return Packed(ids, size, tuple(branches), tuple(starts), truncated)


def branch_losses(model: PreTrainedModel, group: list[Packed]) -> list[np.ndarray]:
    """Negative log-likelihood of every token of each row but the first, ``[tokens - 1]``."""
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return [_row_by_row(model, entry) for entry in group]
    length = max(len(entry.ids) for entry in group)
    ids = torch.zeros(len(group), length, dtype=torch.long)
    for row, entry in enumerate(group):
        ids[row, : len(entry.ids)] = torch.tensor(entry.ids)
    layouts = [_layout(entry, length) for entry in group]
    positions, sees, previous = map(torch.stack, zip(*layouts, strict=True))
    check_token_ids(model, ids.view(-1, 1))  # a column: the positions, not the row, are limited
    mask = torch.zeros(sees.shape, dtype=model.dtype)
    mask.masked_fill_(~sees, torch.finfo(model.dtype).min)  # [batch, query, key]
    inputs = {"input_ids": ids, "position_ids": positions, "attention_mask": mask[:, None]}
    inputs = {name: value.to(model.device) for name, value in inputs.items()}
    logits = model(**inputs, use_cache=False).logits
    losses = []
    for row, entry in enumerate(group):
        targets = inputs["input_ids"][row, 1 : len(entry.ids)]
        before = previous[row, 1 : len(entry.ids)].to(logits.device)
        losses.append(_as_numpy(token_losses(logits[row, before], targets)))
    return losses


def _layout(entry: Packed, length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Positions ``[token]``, what each token sees ``[query, key]``, and the token before it."""
    positions, previous = torch.zeros(length, dtype=torch.long), torch.arange(length) - 1
    sees = torch.eye(length, dtype=torch.bool)  # padding sees itself
    positions[: entry.shared] = torch.arange(entry.shared)
    sees[: len(entry.ids), : entry.shared] = True
    for branch in entry.branches:
        span = branch.stop - branch.start
        positions[branch] = torch.arange(entry.shared, entry.shared + span)
        sees[branch, branch] = True
        previous[branch.start] = entry.shared - 1
    return positions, sees.tril(), previous


def _row_by_row(model: PreTrainedModel, entry: Packed) -> np.ndarray:
    rows = [torch.tensor(entry.ids[: entry.shared] + entry.ids[part]) for part in entry.branches]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)  # what follows a row changes none of it
    check_token_ids(model, ids)
    ids = ids.to(model.device)
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    losses = _as_numpy(token_losses(logits, ids[:, 1:]))
    parts = [losses[0, : entry.shared - 1]]
    for row, part in zip(losses, entry.branches, strict=True):
        parts.append(row[entry.shared - 1 :][: part.stop - part.start])
    return np.concatenate(parts)


def _as_numpy(losses: torch.Tensor) -> np.ndarray:
    return losses.cpu().numpy().astype(np.float64)
