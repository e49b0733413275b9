"""From passages to batches of tokens: packing, counting, and what a batch list remembers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from ..vocabulary import merge_table, protected_tokens
from .domain import Part, check_part

SEPARATOR = "\n\n"


class Batches(list):
    """A list of batches that knows its source and its tokenizer (see `tokenize`)."""

    source: str
    tokenizer: PreTrainedTokenizerBase
    merges: np.ndarray
    protected: np.ndarray

    def draws(self, count: int = 2) -> list[Batches]:
        """Draws of disjoint text and equal length: consecutive stretches of the windows.

        Stretches, not every other window: neighbours come from the same document.

        Raises
        ------
        ValueError
            If there are fewer windows than draws.
        """
        rows = torch.cat([batch["input_ids"] for batch in self])
        if not 1 <= count <= len(rows):
            raise ValueError(
                f"{len(rows)} window(s) of {rows.shape[1]} tokens cannot give {count} draws; take "
                "more tokens or a shorter seq_len"
            )
        size, length = len(self[0]["input_ids"]), len(rows) // count
        known = (self.source, self.tokenizer, self.merges, self.protected)
        return [_batches(part, size, *known) for part in rows[: count * length].split(length)]


def encoded(
    passages: Iterable[str], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[list[int], int]]:
    """Token ids and characters of each passage, with the separator that ends it."""
    check_part(passages)
    for passage in passages:
        text = passage + SEPARATOR
        yield tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], len(text)


def count_tokens(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """How often each token occurs in passages, ``[vocabulary]``; needs no model.

    For `contextual_plan`, which should know more of a domain's words than a short pass sees.

    Parameters
    ----------
    texts : Part or iterable of str
        Passages.
    tokenizer : transformers.PreTrainedTokenizerBase
        What cuts them.
    """
    counts = np.zeros(len(tokenizer), dtype=np.int64)
    for ids, _ in encoded(texts, tokenizer):
        counts += np.bincount(ids, minlength=len(counts))
    return counts


def excerpt(
    texts: Part | Sequence[str],
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_tokens: int | None = None,
    max_characters: int | None = None,
) -> Part | Sequence[str]:
    """The first whole passages within a budget; at least one.

    To compare models whose vocabularies differ, cut the text once, with the dense model's
    tokenizer: a limit in tokens would show each of them another text.

    Parameters
    ----------
    texts : Part or sequence of str
        Passages.
    tokenizer : transformers.PreTrainedTokenizerBase, optional
        What counts the tokens.
    max_tokens, max_characters : int, optional
        Budgets; None is no limit.

    Raises
    ------
    ValueError
        If a budget is below 2 or there is no text.
    """
    check_part(texts)
    for name, value in (("max_tokens", max_tokens), ("max_characters", max_characters)):
        if value is not None and value < 2:
            raise ValueError(f"{name} is {value}; expected at least 2, or None for no limit")
    if not any(passage.strip() for passage in texts):
        raise ValueError(f"{texts if isinstance(texts, Part) else 'the text'} is empty")
    tokens = characters = count = 0
    for passage in texts:
        characters += len(passage)
        if max_tokens is not None:
            tokens += len(tokenizer(passage + SEPARATOR, add_special_tokens=False)["input_ids"])
        over = tokens > (max_tokens or tokens) or characters > (max_characters or characters)
        if count and over:
            break
        count += 1
    chosen = tuple(texts[:count])
    return Part(texts.domain, texts.name, chosen) if isinstance(texts, Part) else chosen


def window_prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """``[bos]`` for tokenizers that begin every text with it, else nothing."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a")["input_ids"][0] == bos else []


def tokenize(
    texts: Part | Sequence[str] | str,
    tokenizer: PreTrainedTokenizerBase,
    seq_len: int = 256,
    max_tokens: int | None = None,
    batch_size: int = 8,
) -> Batches:
    """Pack passages, separated by a blank line, into full windows of tokens.

    Parameters
    ----------
    texts : Part, sequence of str, or str
        Passages in the order in which they are packed.
    tokenizer : transformers.PreTrainedTokenizerBase
        The model's tokenizer.
    seq_len : int
        Tokens per window (with the beginning-of-text token of models that have one).
    max_tokens : int, optional
        Stop after this many tokens; by default all text is used. The last, partial window is left
        out.
    batch_size : int
        Windows per batch.

    Returns
    -------
    Batches
        A list of ``{"input_ids", "attention_mask"}`` with tensors ``[batch, seq_len]``.

    Raises
    ------
    ValueError
        If the text or `max_tokens` is less than one window, or a number is not positive.
    """
    prefix = window_prefix(tokenizer)
    for name, value in (("seq_len", seq_len - len(prefix)), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} is {value}; expected a positive number")
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens}; expected a positive number or None")
    if max_tokens is not None and max_tokens < seq_len:
        raise ValueError(
            f"max_tokens is {max_tokens}, less than one window of seq_len={seq_len}; give "
            f"{seq_len} or more, or a shorter seq_len"
        )
    step = seq_len - len(prefix)
    limit = float("inf") if max_tokens is None else max_tokens // seq_len * step
    ids: list[int] = []
    for tokens, _ in encoded([texts] if isinstance(texts, str) else texts, tokenizer):
        ids += tokens
        if len(ids) >= limit:
            break
    count = min(len(ids), limit) // step
    if count == 0:
        raise ValueError(
            f"{texts if isinstance(texts, Part) else 'the text'} has {len(ids)} tokens, less than "
            f"one window of seq_len={seq_len}; give more text or a shorter seq_len"
        )
    windows = torch.tensor(ids[: int(count) * step]).reshape(-1, step)
    windows = torch.cat([torch.tensor([prefix] * len(windows), dtype=torch.long), windows], 1)
    source = str(texts) if isinstance(texts, Part) else "text"
    merges, protected = merge_table(tokenizer), protected_tokens(tokenizer)
    return _batches(windows, batch_size, source, tokenizer, merges, protected)


def _batches(windows: torch.Tensor, size: int, source, tokenizer, merges, protected) -> Batches:
    batches = Batches(
        {"input_ids": rows, "attention_mask": torch.ones_like(rows)} for rows in windows.split(size)
    )
    batches.source, batches.tokenizer = source, tokenizer
    batches.merges, batches.protected = merges, protected
    return batches


def unpadded(batches: Iterable[dict[str, torch.Tensor]]) -> Iterator[torch.Tensor]:
    """Token ids ``[window, token]`` without padding: a padded batch comes window by window.

    What each window then sees does not depend on the others it was batched with. Windows of less
    than two tokens, which have nothing to predict, are left out.

    Raises
    ------
    ValueError
        If nothing is left.
    """
    found = False
    for batch in batches:
        if not isinstance(batch, Mapping) or "input_ids" not in batch:
            raise ValueError(
                f"a batch is {type(batch).__name__} {str(batch)[:40]!r}; expected a mapping with "
                "input_ids [batch, token], as tokenize(text, tokenizer) gives them"
            )
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        whole = mask is None or bool(mask.all())
        for part in (
            (ids,)
            if whole
            else (row[real.bool()][None] for row, real in zip(ids, mask, strict=True))
        ):
            if part.shape[1] > 1:
                found = True
                yield part
    if not found:
        raise ValueError("no tokens: batches is empty, all padding, or of single tokens")
