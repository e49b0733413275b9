"""Domains: text in four disjoint parts, with multiple-choice questions.

Documents are cut into passages, near-duplicates are dropped, and the rest is dealt into
``calibration``, ``train``, ``validation`` and ``test`` by the hash of its content: the same text
always gives the same parts, and no part can see another's.
"""

from __future__ import annotations

import hashlib
import os
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import InitVar, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from transformers import PreTrainedTokenizerBase

from ..checks import (
    DictOf,
    Flag,
    Instance,
    ListOf,
    Location,
    Text,
    Texts,
    Tokenizer,
    checked,
    invalid,
    suggest,
    to_path,
)
from ..store import DATA, cache_folder, cache_key, cached, pinned_packages, read_toml
from .passages import PASSAGE_WORDS, characters, count_words, cut, near_duplicates
from .questions import Questions, read_questions
from .running import token_ids
from .sources import read_hub, read_source
from .user_texts import FILES, exists, find_questions, read_path

#: Share of the words that each part gets.
PARTS = {"calibration": 0.25, "train": 0.45, "validation": 0.10, "test": 0.20}
_VERSION = 2  # of the cutting rules: a change must not reuse parts cached under the old ones


_PART = {"domain": Text(), "name": Text(), "passages": ListOf(Text())}


@dataclass(frozen=True)
class Part(Sequence):
    """Passages of one part of a domain; a sequence of strings that knows where it comes from."""

    domain: str
    name: str
    passages: tuple[str, ...]

    def __post_init__(self):
        for name, check in _PART.items():
            object.__setattr__(self, name, check(name, getattr(self, name)))

    def __getitem__(self, index):
        return self.passages[index]

    def __len__(self) -> int:
        return len(self.passages)

    def __str__(self) -> str:
        return f"{self.domain}/{self.name}"

    def __repr__(self) -> str:
        return f"Part({self!s}, {len(self)} passages)"


@dataclass(frozen=True)
class Domain:
    """A body of text in four disjoint parts, and questions on it.

    Parameters
    ----------
    name, title, licence, attribution : str
        What it is and who may use it.
    calibration, train, validation, test : Part
        Disjoint passages: statistics, recovery, stopping, results.
    dropped : int
        Passages left out because they nearly repeat an earlier one.
    question_sources : tuple of dict
        Where `questions` are read from (see `minigpt_lab.domains.questions.read_questions`).
    notes : tuple of str
        What was left out of a user's files, and how they were read.
    checked : bool
        The parts are known to be disjoint (they come from the cache): do not compare them again.

    Raises
    ------
    ValueError
        If two parts share an exact or near-duplicate passage.
    """

    name: str
    title: str
    licence: str
    attribution: str
    calibration: Part
    train: Part
    validation: Part
    test: Part
    dropped: int = 0
    question_sources: tuple[dict, ...] = field(default=(), compare=False)
    notes: tuple[str, ...] = field(default=(), compare=False)
    checked: InitVar[bool] = False

    def __post_init__(self, checked: bool):
        Text()("name", self.name)
        for name, part in self.parts.items():
            Instance(Part, "lab.make_domain cuts texts into parts")(name, part)
        if not checked:
            check_disjoint(self.parts)

    def __repr__(self) -> str:
        counts = ", ".join(f"{name} {len(part)}" for name, part in self.parts.items())
        return f"Domain({self.name!r}, passages: {counts})"

    @cached_property
    def questions(self) -> Questions:
        """Multiple-choice questions, read when first asked for.

        They come from the domain's declared sets (any first n are a fair sample) or the
        ``questions.jsonl`` of a user's folder, in its order. Otherwise they are built from the test
        part: which of four sentences continues the text? Those share text with the test perplexity,
        never with calibration, training or validation.
        """
        other = [text for part in self.parts.values() for text in part if part is not self.test]
        return read_questions(self.question_sources, self.test, other, self.name, self.licence)

    @property
    def parts(self) -> dict[str, Part]:
        """The four parts by name."""
        return {name: getattr(self, name) for name in PARTS}

    def summary(self, tokenizer: PreTrainedTokenizerBase | None = None) -> pd.DataFrame:
        """Passages, words, characters and (with a tokenizer) tokens of every part."""
        tokenizer = (Tokenizer() | None)("tokenizer", tokenizer)
        rows = []
        for name, part in self.parts.items():
            row = {
                "domain": self.name,
                "part": name,
                "passages": len(part),
                "words": sum(map(count_words, part)),
                "characters": sum(map(len, part)),
            }
            if tokenizer is not None:
                row["tokens"] = len(token_ids(part, tokenizer))
            rows.append({**row, "licence": self.licence})
        return pd.DataFrame(rows)


@checked(name_or_path=Location(), column=Text() | None, online=Flag())
def load_domain(
    name_or_path: str | os.PathLike, *, column: str | None = None, online: bool = False
) -> Domain:
    """A shipped domain, a user's own text, or a Hugging Face dataset, cut into disjoint parts.

    What is left out of a user's files is said in one warning, and in the domain's `notes`.

    Parameters
    ----------
    name_or_path : str or path
        A name (see `domain_names`); a file: ``.txt`` or ``.md`` is one text, ``.jsonl``, ``.json``,
        ``.csv`` or ``.tsv`` one in each row (a chat is one text); a folder of such files, at any
        depth; or a hub dataset id (``"user/dataset"``). A folder's ``questions.jsonl`` or ``.json``
        holds its multiple-choice questions: keys ``question``, ``choices``, ``answer`` (the right
        choice, its letter or its index), and if wanted ``context``, ``source``, ``licence``.
    column : str, optional
        The column with the text, where there are several.
    online : bool
        For a shipped domain: read the data set that the Mini-GPTs paper used, from the hub.

    Returns
    -------
    Domain

    Raises
    ------
    ValueError
        If the name is unknown, the text too short for four parts, or the column missing.
    minigpt_lab.store.SourceUnavailable
        If a pinned source cannot be had.
    """
    name, declared = os.fspath(name_or_path), read_toml(DATA / "domains.toml")
    if isinstance(name_or_path, os.PathLike):  # "law" is a name of the kit, Path("law") a folder
        declared = {}
    if name in declared and not online:
        return _shipped(name, declared[name])
    if name in declared:
        entry = declared[name]
        if "hub" not in entry:
            raise ValueError(f"domain {name!r} has no online data set; load it without online=True")
        return _made(
            name, *read_hub(entry["hub"]), f"{entry['title']} (hub)",
            question_sources=entry.get("questions", ()),
        )  # fmt: skip
    path = to_path(name)
    if exists(path):
        own = find_questions(path)
        asked = [{"reader": "own", "path": str(own)}] if own else []
        whole = path.resolve()  # "." has no name of its own
        called = whole.name if path.is_dir() else whole.stem
        return _made(called, *read_path(path, column), question_sources=asked)
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) and path.suffix.lower() not in FILES:
        hub = {"path": name, "column": column}
        return _made(name.replace("/", "-"), *read_hub(hub))
    raise ValueError(
        f"unknown domain {name!r}: not a shipped one ({suggest(name, list(declared))}), not a file "
        "or folder, not a hub id"
    )


def load_domains(names_or_paths: Iterable[str | os.PathLike]) -> list[Domain]:
    """Several domains, as `load_domain` gives them, that their names tell apart.

    Results are kept by a domain's name, and that of a file or folder is its last part.

    Parameters
    ----------
    names_or_paths : iterable of str or path
        Each as `load_domain` takes it.

    Raises
    ------
    ValueError
        If two texts that differ have the same name.
    InvalidArgument
        If one name is given instead of a list of them.
    """
    if isinstance(names_or_paths, str | os.PathLike):
        raise invalid("names_or_paths", names_or_paths, "a list of names", "put it into brackets")
    sources, found = {}, []
    for source in ListOf(Location())("names_or_paths", names_or_paths):
        domain = load_domain(source)
        first, twin = sources.setdefault(domain.name, (source, domain))
        if twin != domain:
            raise ValueError(
                f"{str(first)!r} and {str(source)!r} are different texts, and both would be called "
                f"{domain.name!r}; rename one of them"
            )
        found.append(domain)
    return found


@checked(tiny=Flag())
def domain_names(*, tiny: bool = False) -> list[str]:
    """Names of the shipped domains.

    Parameters
    ----------
    tiny : bool
        The project's own short texts instead of the six real domains.
    """
    names = read_toml(DATA / "domains.toml")
    return [name for name in names if name.startswith("tiny-") == tiny]


@checked(
    name=Text(), documents=ListOf(Text()), title=Text(), licence=Text(), attribution=Text(),
    question_sources=ListOf(Instance(dict)),
)  # fmt: skip
def make_domain(
    name: str, documents: Iterable[str], *, title: str = "", licence: str = "",
    attribution: str = "", question_sources: Iterable[dict] = (),
) -> Domain:  # fmt: skip
    """Cut documents into passages, drop near-duplicates and deal the rest into four parts.

    With 40 documents or more every document falls into one part whole; with fewer, passages do.

    Parameters
    ----------
    name : str
        What its parts and results are called.
    documents : iterable of str
        Texts of any length.
    title, licence, attribution : str, optional
        What it is and who may use it.
    question_sources : iterable of dict, optional
        Where multiple-choice questions are read from; by default they are made of the test part.

    Raises
    ------
    ValueError
        If there are fewer passages than parts.
    """
    facts = {"title": title, "licence": licence, "attribution": attribution}
    return _made(name, documents, **facts, question_sources=question_sources)


def _made(
    name: str, documents: Iterable[str], notes: Iterable[str] | None = None, title: str = "",
    licence: str = "", attribution: str = "", question_sources: Iterable[dict] = (),
) -> Domain:  # fmt: skip
    """`make_domain`, also of a user's files, about which there may be `notes`."""
    name = characters(name)
    if not name.strip():
        raise invalid("name", name, "a name for the domain")
    more = "".join(f"; {note}" for note in notes or ())
    pieces = [cut(characters(document)) for document in documents]
    flat = [passage for document in pieces for passage in document]
    if not flat:
        raise ValueError(f"domain {name!r} is empty: no text found{more}")
    repeats = near_duplicates(flat)
    place, blocks = 0, []
    for document in pieces:
        kept = [p for i, p in enumerate(document, place) if i not in repeats]
        place += len(document)
        blocks += [kept] if kept else []
    if len(blocks) < 40:
        blocks = [[passage] for block in blocks for passage in block]
    if len(blocks) < len(PARTS):
        raise ValueError(
            f"domain {name!r:.60} has {len(blocks)} passage(s) of about {PASSAGE_WORDS} words; "
            f"four disjoint parts need at least 4: give more text{more}"
        )
    parts = _deal(blocks)
    if notes is not None and repeats:
        again = f"dropped {len(repeats)} of {len(flat)} passages, which nearly repeat earlier ones"
        notes = [*notes, again]
    if notes:
        warnings.warn(f"domain {name!r}: {'; '.join(notes)}", stacklevel=4)
    return Domain(
        name, title or name, licence, attribution,
        **{part: Part(name, part, tuple(parts[part])) for part in PARTS}, dropped=len(repeats),
        question_sources=tuple(question_sources), notes=tuple(notes or ()),
    )  # fmt: skip


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


def _deal(blocks: list[list[str]]) -> dict[str, list[str]]:
    """Deal blocks into parts by words, in the order of their hashes; every part gets one."""
    blocks = sorted(blocks, key=lambda block: hashlib.sha256("".join(block).encode()).digest())
    sizes = np.cumsum([sum(map(count_words, block)) for block in blocks])
    shares = np.cumsum(list(PARTS.values()))[:-1]
    cuts = np.searchsorted(sizes, shares * sizes[-1])
    for place in range(len(cuts)):  # no part may be empty
        low = cuts[place - 1] + 1 if place else 1
        cuts[place] = np.clip(cuts[place], low, len(blocks) - len(cuts) + place)
    bounds = [0, *cuts, len(blocks)]
    return {
        part: [p for block in blocks[bounds[i] : bounds[i + 1]] for p in block]
        for i, part in enumerate(PARTS)
    }


def _shipped(name: str, entry: dict) -> Domain:
    """A declared domain, from the cache or (first use) from its sources."""
    pins = [pinned_packages()[s["package"]].sha256 for s in entry["texts"] if "package" in s]
    local = [(DATA / s["member"]).read_text() for s in entry["texts"] if "package" not in s]
    facts: dict[str, Any] = {key: entry[key] for key in ("title", "licence", "attribution")}
    facts["question_sources"] = tuple(entry.get("questions", ()))

    def made() -> dict:
        documents = [document for source in entry["texts"] for document in read_source(source)]
        domain = make_domain(name, documents, **facts)
        return {**{part: list(p) for part, p in domain.parts.items()}, "dropped": domain.dropped}

    key = cache_key(_VERSION, entry["texts"], pins, local)
    stored = cached(cache_folder() / "domains" / f"{name}-{key[:12]}.json", made)
    parts = {part: Part(name, part, tuple(stored[part])) for part in PARTS}
    return Domain(name, **facts, **parts, dropped=stored["dropped"], checked=True)
