"""Passages: splitting a text, counting words, finding near-duplicates."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from itertools import chain

PASSAGE_WORDS = 150
SHINGLE = 8  # words; two passages that share half their runs of this length are near-duplicates
CJK = "\u3400-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{CJK}]|\w+")  # a CJK character counts as a word
_SENTENCE = re.compile(r".+?(?:[.!?。！？][\"')\]]*\s+|\n+|$)", re.DOTALL)
_LONG = (4 * PASSAGE_WORDS, 8000)  # words, characters: no sentence or passage is longer
_RUN = re.compile(r"\S{1,1000}\s*")


# NUL and halves of a character: JSON's escapes can name them, no encoding holds them
_NO_CHARACTER = {0: None, **dict.fromkeys(range(0xD800, 0xE000), "\ufffd")}


def characters(text: str) -> str:
    """A text without what is no character; half of one becomes U+FFFD."""
    return text.translate(_NO_CHARACTER)


def sentences(text: str) -> list[str]:
    """A text in sentences or lines, each with the white space that ends it."""
    return _SENTENCE.findall(text)


def split_passages(document: str, words: int = PASSAGE_WORDS) -> list[str]:
    """Cut a text into passages of about `words` words, at ends of sentences or lines.

    Where neither ends for long (a transcript without punctuation), at white space.
    """
    passages, current, length = [], "", 0
    for piece in chain.from_iterable(map(_without_end, sentences(document))):
        current, length = current + piece, length + count_words(piece)
        if length >= words or len(current) >= _LONG[1]:
            passages.append(current.strip())
            current, length = "", 0
    if length:
        passages.append(current.strip())
    return passages


def _without_end(sentence: str) -> list[str]:
    """The sentence; one that does not end, in words."""
    most_words, most_characters = _LONG
    long = len(sentence) > most_characters or count_words(sentence) > most_words
    return _RUN.findall(sentence) if long else [sentence]


def split_words(text: str) -> list[str]:
    """Words, or characters of Chinese."""
    return _WORD.findall(text)


def count_words(text: str) -> int:
    """Number of words, or characters of Chinese."""
    return len(split_words(text))


def near_duplicates(passages: Sequence[str], parts: Sequence[str] | None = None) -> dict[int, int]:
    """Passages that repeat an earlier one: index to the index of what it repeats.

    Two passages count as the same when the shorter shares at least half of its runs of `SHINGLE`
    words with the other (case and punctuation ignored).

    Parameters
    ----------
    passages : sequence of str
        Texts to compare.
    parts : sequence of str, optional
        The part each passage is in; then only passages of different parts are compared.
    """
    owners: dict[int, list[int]] = {}
    sizes, repeats = [], {}
    for index, passage in enumerate(passages):
        words = split_words(passage.lower())
        count = max(1, len(words) - SHINGLE + 1)
        runs = {hash(tuple(words[i : i + SHINGLE])) for i in range(count)}
        sizes.append(len(runs))
        shared = Counter(owner for run in runs for owner in owners.get(run, ()))
        for earlier, common in shared.items():
            foreign = parts is None or parts[index] != parts[earlier]
            if foreign and 2 * common >= min(len(runs), sizes[earlier]):
                repeats[index] = earlier
                break
        if parts is not None or index not in repeats:
            for run in runs:
                owners.setdefault(run, []).append(index)
    return repeats
