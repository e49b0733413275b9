"""How likely each of several continuations of one prompt is, in one pass.

They stand side by side behind the prompt; each sees the prompt and itself, at the positions that it
would have alone. So the prompt is computed once and without a cache, for every architecture that
can be told positions. Others (ALiBi counts from the mask) get one row for every continuation.
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
from ..domains import common_beginning, encode, window_prefix
from ..models import check_token_ids


@dataclass(frozen=True)
class Packed:
    """A prompt and its continuations as one row of tokens.

    Parameters
    ----------
    ids : list of int
        The tokens that all continuations share, then each one's own.
    shared : int
        How many are shared.
    branches : tuple of slice
        Each continuation's own tokens in `ids`.
    starts : tuple of int
        The first of them that belongs to the continuation; those before it end the prompt.
    truncated : int
        Tokens cut from the front of the prompt.
    """

    ids: list[int]
    shared: int
    branches: tuple[slice, ...]
    starts: tuple[int, ...]
    truncated: int


def longest(model: PreTrainedModel, seq_len: int | None) -> int:
    """Most tokens that the model and the caller allow in a row."""
    # A sliding window hides the beginning of longer rows, which our mask would not know.
    limits = [seq_len, *(getattr(model.config, key, None) for key in _LIMITS)]
    return min((value for value in limits if value is not None), default=1 << 30)


_LIMITS = ("max_position_embeddings", "sliding_window")


def pack(
    prompt: str, follows: Sequence[str], tokenizer: PreTrainedTokenizerBase, limit: int
) -> Packed:
    """Tokens of a prompt and of what may follow it after a space, cut to a limit from the left.

    Raises
    ------
    ValueError
        If a continuation has no tokens, or the limit leaves none before them.
    """
    begin = window_prefix(tokenizer)
    texts = [prompt, *(f"{prompt} {follow}" for follow in follows)]
    # The space belongs to the continuation, which may also change the prompt's last token: it
    # starts where its tokens part from those of the prompt alone.
    alone, *whole = (encode(text, tokenizer)["input_ids"] for text in texts)
    parts = [common_beginning(alone, tokens) for tokens in whole]
    for follow, part, tokens in zip(follows, parts, whole, strict=True):
        if part == len(tokens):
            raise ValueError(f"its choice {follow!r} has no tokens in this tokenizer")
    length, shared = len(begin) + max(map(len, whole)), min(parts)
    cut = max(0, length - limit)
    if len(begin) + shared - cut < 1:
        raise ValueError(
            f"no token is left before its choices: {length} tokens with the longest, of which "
            f"{shared} come before, limit {limit}; shorten the choices"
        )
    ids = begin + alone[cut:shared]
    size, branches, starts = len(ids), [], []
    for part, tokens in zip(parts, whole, strict=True):
        branches.append(slice(len(ids), len(ids) + len(tokens) - shared))
        starts.append(len(ids) + part - shared)
        ids = ids + tokens[shared:]
    return Packed(ids, size, tuple(branches), tuple(starts), cut)


def branch_losses(model: PreTrainedModel, group: list[Packed]) -> list[np.ndarray]:
    """Negative log-likelihood of every token of each row but the first, ``[tokens - 1]``."""
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return [_row_by_row(model, entry) for entry in group]
    length = max(len(entry.ids) for entry in group)
    ids = torch.zeros(len(group), length, dtype=torch.long)
    positions = torch.zeros_like(ids)
    seen = torch.eye(length, dtype=torch.bool).repeat(len(group), 1, 1)  # padding sees itself
    before = []
    for row, entry in enumerate(group):
        ids[row, : len(entry.ids)] = torch.tensor(entry.ids)
        positions[row, : entry.shared] = torch.arange(entry.shared)
        seen[row, : len(entry.ids), : entry.shared] = True
        previous = torch.arange(len(entry.ids)) - 1
        for branch in entry.branches:
            span = branch.stop - branch.start
            positions[row, branch] = torch.arange(entry.shared, entry.shared + span)
            seen[row, branch, branch] = True
            previous[branch.start] = entry.shared - 1
        before.append(previous[1:])
    seen &= torch.ones(length, length, dtype=torch.bool).tril()
    check_token_ids(model, ids.view(-1, 1))  # a column: the positions, not the row, are limited
    device, dtype = model.device, model.dtype
    mask = torch.zeros(len(group), 1, length, length, dtype=dtype)
    mask.masked_fill_(~seen[:, None], torch.finfo(dtype).min)
    logits = model(
        input_ids=ids.to(device), attention_mask=mask.to(device),
        position_ids=positions.to(device), use_cache=False,
    ).logits  # fmt: skip
    found = []
    for row, (entry, previous) in enumerate(zip(group, before, strict=True)):
        targets = ids[row, 1 : len(entry.ids)].to(device)
        losses = token_losses(logits[row, previous.to(device)], targets)
        found.append(losses.cpu().numpy())
    return [values.astype(np.float64) for values in found]


def _row_by_row(model: PreTrainedModel, entry: Packed) -> np.ndarray:
    rows = [torch.tensor(entry.ids[: entry.shared] + entry.ids[part]) for part in entry.branches]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)  # what follows a row changes none of it
    check_token_ids(model, ids)
    ids = ids.to(model.device)
    losses = token_losses(model(input_ids=ids, use_cache=False).logits[:, :-1], ids[:, 1:])
    losses = losses.cpu().numpy().astype(np.float64)
    found = [losses[0, : entry.shared - 1]]
    for row, part in zip(losses, entry.branches, strict=True):
        found.append(row[entry.shared - 1 :][: part.stop - part.start])
    return np.concatenate(found)
