"""Passages in four disjoint parts, by the hash of their content."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import count, pairwise

import numpy as np

from ..checks import DictOf, ListOf, Text, Texts, check_fields, checked
from .passages import characters, count_words, near_duplicates, split_passages

#: Share of the words that each part gets.
PARTS = {"calibration": 0.25, "train": 0.45, "validation": 0.10, "test": 0.20}
_WHOLE_DOCUMENTS = 40  # with so many documents, a part holds whole ones


@dataclass(frozen=True)
class Part(Sequence):
    """Passages of one part of a domain; a sequence of strings that knows where it comes from."""

    domain: str
    name: str
    passages: tuple[str, ...]

    def __post_init__(self):
        check_fields(self, domain=Text(), name=Text(), passages=ListOf(Text()))

    def __getitem__(self, index):
        return self.passages[index]

    def __len__(self) -> int:
        return len(self.passages)

    def __str__(self) -> str:
        return f"{self.domain}/{self.name}"

    def __repr__(self) -> str:
        return f"Part({self!s}, {len(self)} passages)"


def split_documents(documents: Iterable[str]) -> tuple[list[list[str]], int]:
    """Passages that go into one part together, and how many near-duplicates were dropped."""
    split = [split_passages(characters(document)) for document in documents]
    repeats = near_duplicates([passage for document in split for passage in document])
    index, blocks = count(), []
    for document in split:
        kept = [passage for passage in document if next(index) not in repeats]
        blocks += [kept] if kept else []
    if len(blocks) < _WHOLE_DOCUMENTS:
        blocks = [[passage] for block in blocks for passage in block]
    return blocks, len(repeats)


def deal(blocks: list[list[str]]) -> dict[str, list[str]]:
    """Deal blocks into parts by words, in the order of their hashes; every part gets one."""
    blocks = sorted(blocks, key=lambda block: hashlib.sha256("".join(block).encode()).digest())
    words = np.cumsum([sum(map(count_words, block)) for block in blocks])
    shares = np.cumsum(list(PARTS.values()))[:-1]
    ends = np.searchsorted(words, shares * words[-1])
    for part in range(len(ends)):  # no part may be empty
        least = ends[part - 1] + 1 if part else 1
        ends[part] = np.clip(ends[part], least, len(blocks) - len(ends) + part)
    bounds = pairwise([0, *ends, len(blocks)])
    return {
        part: [passage for block in blocks[start:end] for passage in block]
        for part, (start, end) in zip(PARTS, bounds, strict=True)
    }


@checked(parts=DictOf(Text(), Texts()))
def check_disjoint(parts: dict[str, Sequence[str]]) -> None:
    """Refuse parts that share text.

    Raises
    ------
    ValueError
        Naming two parts and the passage that is in both, exactly or nearly.
    """
    names = [name for name, part in parts.items() for _ in part]
    passages = [passage for part in parts.values() for passage in part]
    for later, earlier in near_duplicates(passages, names).items():
        raise ValueError(
            f"parts {names[earlier]!r} and {names[later]!r} overlap: {passages[later][:60]!r} is "
            "in both (exactly or nearly); remove it from one of them"
        )
