"""Running text: passages joined, encoded once, and the place of each token.

A model sees text in one piece, and a blank line changes the tokens before and after it: no passage
is encoded by itself.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..checks import InvalidArgument

#: Stands between two passages; it counts with the passage that it follows.
SEPARATOR = "\n\n"
_HALF = re.compile("[\ud800-\udfff]")  # a surrogate: JSON may hold one by itself
_MARGIN = 64  # at least so many tokens are encoded after those that are used


@dataclass(frozen=True)
class RunningText:
    """Tokens of running text.

    Parameters
    ----------
    ids : list of int
        As the tokenizer gives them for the joined text, without special tokens.
    passage : numpy.ndarray
        The passage in which each token begins, ``[token]``; a tokenizer in Python, which has no
        offsets, tells it only to a few tokens.
    characters : numpy.ndarray
        Characters that each token adds to the text before it, ``[token]``: they sum to the length
        of the text. Of the tokens that spell one character in bytes, the first counts.
    """

    ids: list[int]
    passage: np.ndarray
    characters: np.ndarray


def as_passages(texts: Sequence[str] | str) -> Sequence[str]:
    """Passages; a string is one."""
    return [texts] if isinstance(texts, str) else texts


def encode(text: str, tokenizer: PreTrainedTokenizerBase, **options) -> dict:
    """A text as the tokenizer encodes it, whole and without special tokens.

    Raises
    ------
    InvalidArgument
        If the text holds half a character, which no encoding has.
    """
    half = _HALF.search(text)
    if half:
        raise InvalidArgument(
            f"the text holds {half[0]!r}, half of a character, in {text[half.start() :][:20]!r}; "
            "expected characters: put text.encode('utf-8', 'replace').decode() instead"
        )
    return tokenizer(
        text, add_special_tokens=False, truncation=False, padding=False, verbose=False, **options
    )


def token_ids(
    texts: Sequence[str] | str, tokenizer: PreTrainedTokenizerBase, limit: int | None = None
) -> list[int]:
    """Token ids of passages as running text.

    Parameters
    ----------
    texts : sequence of str, or str
        Passages.
    tokenizer : transformers.PreTrainedTokenizerBase
        Of the model that reads them.
    limit : int, optional
        Take the first so many tokens; no more text is read than they need.
    """
    return _encode_first(texts, tokenizer, limit)[1]["input_ids"][:limit]


def running_text(
    texts: Sequence[str] | str, tokenizer: PreTrainedTokenizerBase, limit: int | None = None
) -> RunningText:
    """Passages as running text, with the place of every token.

    Parameters
    ----------
    texts, tokenizer, limit
        As for `token_ids`.

    Returns
    -------
    RunningText
    """
    passages, encoding = _encode_first(texts, tokenizer, limit, offsets=tokenizer.is_fast)
    ids = encoding["input_ids"]
    total = len(SEPARATOR.join(passages))
    lengths = [len(passage) + len(SEPARATOR) for passage in passages]
    begins = np.cumsum([0, *lengths[:-1]])  # of the passages, in characters
    if tokenizer.is_fast:
        offsets = np.array(encoding["offset_mapping"], dtype=np.int64).reshape(-1, 2)
        passage, edges = _by_offsets(offsets, begins)
    else:
        counts = _shared_out(passages, len(ids), tokenizer)
        passage, edges = _by_counts(counts, [*begins, total])
    edges[:1] = 0
    characters = np.diff(np.append(edges, total))
    return RunningText(ids[:limit], passage[:limit], characters[:limit])


def _by_offsets(offsets: np.ndarray, begins: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Passage of every token, and where what it adds begins, from a fast tokenizer's offsets.

    A token adds what the one before it has not reached; text that no token stands for counts with
    the next token, but never with that of another passage.
    """
    starts, ends = np.maximum.accumulate(offsets).T
    passage = np.searchsorted(begins, starts, side="right") - 1
    return passage, np.maximum(np.append(0, ends[:-1]), begins[passage])


def _by_counts(counts: np.ndarray, bounds: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """The same from the number of tokens of each passage, which share its characters evenly."""
    passage = np.repeat(np.arange(len(counts)), counts)
    edges = [
        np.linspace(begin, end, size, endpoint=False).astype(np.int64)
        for (begin, end), size in zip(pairwise(bounds), counts, strict=True)
    ]
    return passage, np.concatenate(edges)


def _encode_first(
    texts: Sequence[str] | str, tokenizer, limit: int | None, offsets: bool = False
) -> tuple[Sequence[str], dict]:
    """As many first passages as `limit` tokens need, and their encoding."""
    passages = as_passages(texts)
    options = {"return_offsets_mapping": True} if offsets else {}
    count = len(passages)
    if limit is not None:
        lengths = accumulate(len(passage) + len(SEPARATOR) for passage in passages)
        count = bisect_left(list(lengths), 6 * (limit + _MARGIN)) + 2
    while True:
        part = passages[:count]
        encoding = encode(SEPARATOR.join(part), tokenizer, **options)
        if limit is None or len(part) == len(passages):
            return part, encoding
        # What follows changes the tokens near the end: the last passage does not count.
        last = len(encode(part[-1], tokenizer)["input_ids"])
        if len(encoding["input_ids"]) - max(last, _MARGIN) >= limit:
            return part, encoding
        count *= 2


def _shared_out(
    passages: Sequence[str], total: int, tokenizer: PreTrainedTokenizerBase
) -> np.ndarray:
    """About so many of `total` tokens are in each passage, for a tokenizer without offsets.

    As many as the passage has when it is encoded alone; the few tokens that reach over into the
    next passage there are taken from all alike.
    """
    alone = [len(encode(passage + SEPARATOR, tokenizer)["input_ids"]) for passage in passages]
    ends = np.cumsum(alone)
    return np.diff(np.round(ends * (total / max(1, ends[-1]))).astype(np.int64), prepend=0)


def window_prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that the tokenizer puts before every text: ``[bos]`` for some, nothing for most."""
    # What stands around a text may be in front of it, behind it, or both: look where a text is.
    special = set(tokenizer.all_special_ids)
    for token in range(len(tokenizer)):
        text = "" if token in special else tokenizer.decode([token])
        bare = encode(text, tokenizer)["input_ids"] if text.strip() else []
        if bare and not special & {*bare}:
            whole = tokenizer(text, truncation=False, padding=False, verbose=False)["input_ids"]
            for before in range(len(whole) - len(bare) + 1):
                if whole[before : before + len(bare)] == bare:
                    return whole[:before]
    return []
