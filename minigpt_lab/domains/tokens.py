"""From passages to batches of tokens: packing, counting, excerpts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from operator import length_hint
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..checks import Integer, InvalidArgument, Texts, Tokenizer, check_batch, checked
from ..models import merge_table, protected_tokens
from .parts import Part
from .running import SEPARATOR, as_passages, running_text, token_ids, window_prefix


class Batches(list):
    """A list of batches that knows its source and its tokenizer (see `tokenize`)."""

    source: str
    tokenizer: PreTrainedTokenizerBase
    merges: np.ndarray
    protected: np.ndarray

    def __getitem__(self, index: Any) -> Any:
        """A batch; of a slice, batches that know the same."""
        found = super().__getitem__(index)
        if not isinstance(index, slice):
            return found
        part = Batches(found)
        vars(part).update(vars(self))
        return part

    @checked(count=Integer(1))
    def samples(self, count: int = 2) -> list[Batches]:
        """Samples of disjoint text and equal length: consecutive stretches of the windows.

        Stretches, not every other window: neighbours come from the same document.

        Raises
        ------
        ValueError
            If there are fewer windows than samples.
        """
        rows = torch.cat([batch["input_ids"] for batch in self])
        if count > len(rows):
            raise ValueError(
                f"{len(rows)} window(s) of {rows.shape[1]} tokens cannot give {count} samples; "
                "take more tokens or a shorter seq_len"
            )
        size, length = len(self[0]["input_ids"]), len(rows) // count
        parts = rows[: count * length].split(length)
        return [_batches(part, size, **vars(self)) for part in parts]


@checked(text=Texts(), tokenizer=Tokenizer())
def count_tokens(text: Sequence[str] | str, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Count every token in running text, ``[vocabulary]``; needs no model.

    For `contextual_plan`, which should know more of a domain's words than a short pass sees.

    Parameters
    ----------
    text : Part, str or iterable of str
        Passages, joined as in `tokenize`.
    tokenizer : transformers.PreTrainedTokenizerBase
        Of a model; none is needed.
    """
    ids = np.array(token_ids(text, tokenizer), dtype=np.int64)
    return np.bincount(ids, minlength=len(tokenizer))


_BUDGET = Integer(2) | None


@checked(text=Texts(), tokenizer=Tokenizer() | None, max_tokens=_BUDGET, max_characters=_BUDGET)
def excerpt(
    text: Part | Sequence[str],
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    max_tokens: int | None = None,
    max_characters: int | None = None,
) -> Part | Sequence[str]:
    """The first whole passages within a budget; at least one.

    To compare models whose vocabularies differ, make one excerpt with the dense model's tokenizer:
    a limit in tokens would give each of them another text.

    Parameters
    ----------
    text : Part, str or sequence of str
        Passages.
    tokenizer : transformers.PreTrainedTokenizerBase, optional
        Of the tokens counted.
    max_tokens, max_characters : int, optional
        Budgets for the passages joined by blank lines; None is no limit.

    Raises
    ------
    ValueError
        If a budget is below 2, there is no text, or nothing to count tokens with.
    """
    passages = as_passages(text)
    if max_tokens is not None and tokenizer is None:
        raise InvalidArgument("tokenizer is None; expected one to count max_tokens with")
    if not any(passage.strip() for passage in passages):
        raise ValueError(f"{text if isinstance(text, Part) else 'the text'} is empty")
    count = len(passages)
    if max_characters is not None:
        lengths = accumulate(len(passage) + len(SEPARATOR) for passage in passages)
        fitting = (length - len(SEPARATOR) <= max_characters for length in lengths)
        count = max(1, sum(fitting))
    if max_tokens is not None:
        count = _within(passages[:count], tokenizer, max_tokens)
    chosen = tuple(passages[:count])
    return Part(text.domain, text.name, chosen) if isinstance(text, Part) else chosen


def _within(passages: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> int:
    """Number of first passages with at most so many tokens together; at least one."""

    def fit(count: int) -> bool:
        return len(token_ids(passages[:count], tokenizer, max_tokens + 1)) <= max_tokens

    begun = running_text(passages, tokenizer, max_tokens + 1).passage
    if len(begun) <= max_tokens:
        return len(passages)
    count = int(begun[-1])  # passages before the one that the first token too many begins in
    # What follows a passage may change its last tokens: count it as it ends the text.
    while fit(count + 1):
        count += 1
    while count > 1 and not fit(count):
        count -= 1
    return max(1, count)


@checked(
    text=Texts(),
    tokenizer=Tokenizer(),
    seq_len=Integer(1),
    max_tokens=Integer(1) | None,
    batch_size=Integer(1),
)
def tokenize(
    text: Part | Sequence[str] | str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seq_len: int = 256,
    max_tokens: int | None = None,
    batch_size: int = 8,
) -> Batches:
    """Pack passages into full windows of tokens: joined by blank lines, encoded once, then split.

    Parameters
    ----------
    text : Part, sequence of str, or str
        Passages in the order in which they are packed.
    tokenizer : transformers.PreTrainedTokenizerBase
        The model's tokenizer.
    seq_len : int
        Tokens per window (with the beginning-of-text token of models that have one).
    max_tokens : int, optional
        Stop after this many tokens; by default all text is used. The last, partial window is
        dropped.
    batch_size : int
        Windows per batch.

    Returns
    -------
    Batches
        A list of ``{"input_ids", "attention_mask"}`` with tensors ``[batch, seq_len]``.

    Raises
    ------
    ValueError
        If the text or `max_tokens` is less than one window.
    """
    prefix = window_prefix(tokenizer)
    if seq_len <= len(prefix):
        raise ValueError(
            f"seq_len is {seq_len}; expected more than the {len(prefix)} token(s) that this "
            "tokenizer puts before every text"
        )
    if max_tokens is not None and max_tokens < seq_len:
        raise ValueError(
            f"max_tokens is {max_tokens}, less than one window of seq_len={seq_len}; give "
            f"{seq_len} or more, or a shorter seq_len"
        )
    step = seq_len - len(prefix)
    limit = None if max_tokens is None else max_tokens // seq_len * step
    ids = token_ids(text, tokenizer, limit)
    count = len(ids) // step
    if count == 0:
        raise ValueError(
            f"{text if isinstance(text, Part) else 'the text'} has {len(ids)} tokens, less than "
            f"one window of seq_len={seq_len}; give more text or a shorter seq_len"
        )
    windows = torch.tensor(ids[: count * step]).reshape(-1, step)
    windows = torch.cat([torch.tensor([prefix] * len(windows), dtype=torch.long), windows], 1)
    return _batches(
        windows,
        batch_size,
        source=str(text) if isinstance(text, Part) else "text",
        tokenizer=tokenizer,
        merges=merge_table(tokenizer),
        protected=protected_tokens(tokenizer),
    )


def _batches(windows: torch.Tensor, size: int, **facts) -> Batches:
    batches = Batches(
        {"input_ids": rows, "attention_mask": torch.ones_like(rows)} for rows in windows.split(size)
    )
    vars(batches).update(facts)
    return batches


def unpadded(batches: Iterable[dict[str, torch.Tensor]]) -> Iterator[torch.Tensor]:
    """Token ids ``[window, token]`` without padding: a padded batch comes window by window.

    What each window then sees does not depend on the others it was batched with. Windows of less
    than two tokens, which have nothing to predict, are skipped.

    Raises
    ------
    InvalidArgument
        If a batch is none.
    ValueError
        If nothing is left.
    """
    found = False
    for place, batch in enumerate(batches):
        check_batch(f"batches[{place}]", batch)
        ids, mask = batch["input_ids"].long(), batch.get("attention_mask")
        windows = [ids]
        if mask is not None and not mask.all():
            windows = [row[real.bool()][None] for row, real in zip(ids, mask, strict=True)]
        for window in windows:
            if window.shape[1] > 1:
                found = True
                yield window
    if not found:
        raise ValueError("no tokens: batches is empty, all padding, or of single tokens")


def read_windows(
    batches: Iterable[dict[str, torch.Tensor]], title: str, progress: bool
) -> Iterator[torch.Tensor]:
    """`unpadded` with a progress bar, which knows its end if `batches` has a length."""
    total = length_hint(batches) or None
    return tqdm(unpadded(batches), title, total=total, unit="batch", disable=not progress)
