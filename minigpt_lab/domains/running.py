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
        The passage in which each token begins, ``[token]``.
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
        counts = [*_tokens_before(passages, ids, tokenizer), len(ids)]
        passage, edges = _by_counts(np.diff(counts), [*begins, total])
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


def _tokens_before(
    passages: Sequence[str], ids: list[int], tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """Tokens that begin before each passage, for a tokenizer without offsets."""
    pieces = [passage + SEPARATOR for passage in passages[:-1]]
    alone = [encode(text, tokenizer)["input_ids"] for text in [*pieces, *passages[-1:]]]
    if [token for piece in alone for token in piece] == ids:  # no token crosses
        return [0, *accumulate(map(len, alone[:-1]))]
    counts, text, known = [0], "", (0, 0)
    for piece in pieces:
        text += piece
        # The last place at which the text so far is encoded as in the whole: a token ends there.
        # If that is before the passage's end, the next token begins there and reaches over.
        near = _last_token_end(text, known, max(known[0] + 1, len(text) - _MARGIN), ids, tokenizer)
        known = near or _last_token_end(text, (0, 0), 0, ids, tokenizer) or (0, 0)
        counts.append(known[1] + (known[0] < len(text)))
    return counts


def _last_token_end(
    text: str, known: tuple[int, int], least: int, ids: list[int], tokenizer
) -> tuple[int, int] | None:
    """The last place, not before `least`, at which a token ends, and how many tokens end by then.

    Only text after a place that is known is encoded: the whole again and again takes too long.
    """
    begin, count = known
    for stop in range(len(text), least - 1, -1):
        between = encode(text[begin:stop], tokenizer)["input_ids"]
        if between == ids[count : count + len(between)] and (between or not least):
            return stop, count + len(between)
    return None


def window_prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that the tokenizer puts before every text: ``[bos]`` for some, nothing for most."""
    around = _with_special_tokens("", tokenizer)
    if not around:
        return []
    # What stands around a text may be in front of it, behind it, or both: ask with a text.
    special = set(tokenizer.all_special_ids)
    for token in range(len(tokenizer)):
        text = "" if token in special else tokenizer.decode([token])
        bare = encode(text, tokenizer)["input_ids"] if text.strip() else []
        if bare and not special & {*bare}:
            whole = _with_special_tokens(text, tokenizer)
            for before in range(len(whole) - len(bare) + 1):
                if whole[before : before + len(bare)] == bare:
                    return whole[:before]
    return around[:1] if around[0] == tokenizer.bos_token_id else []


def _with_special_tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """A text's ids with the special tokens that the tokenizer puts around it."""
    return tokenizer(text, truncation=False, padding=False, verbose=False)["input_ids"]
