"""Domains: text in four disjoint parts, with multiple-choice questions.

Documents are split into passages, near-duplicates are dropped, and the rest is dealt into
``calibration``, ``train``, ``validation`` and ``test`` by the hash of its content: the same text
always gives the same parts, and no part contains text of another.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from functools import cached_property
from typing import Any

import pandas as pd
from transformers import PreTrainedTokenizerBase

from ..checks import (
    Flag,
    Instance,
    ListOf,
    Location,
    Text,
    Tokenizer,
    checked,
    invalid,
    suggest,
    to_path,
)
from ..store import DATA, cache_folder, cache_key, cached, pinned_packages, read_toml
from .parts import PARTS, Part, check_disjoint, deal, split_documents
from .passages import PASSAGE_WORDS, characters, count_words
from .questions import Questions, read_questions
from .running import token_ids
from .sources import read_hub, read_source
from .user_texts import FILES, find_questions, read_path

_VERSION = 2  # of the splitting rules: a change must not reuse parts cached under the old ones


@dataclass(frozen=True)
class Domain:
    """A body of text in four disjoint parts, and questions on it.

    Parameters
    ----------
    name, title, licence, attribution : str
        What it is and who may use it.
    calibration, train, validation, test : Part
        Disjoint passages: for statistics, recovery, early stopping, results.
    dropped : int
        Passages that nearly repeat an earlier one, and were dropped.
    question_sources : tuple of dict
        Sources of `questions` (see `minigpt_lab.domains.questions.read_questions`).
    notes : tuple of str
        What was skipped in a user's files, and how they were read.
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
            Instance(Part, "lab.make_domain splits texts into parts")(name, part)
        if not checked:
            check_disjoint(self.parts)

    def __repr__(self) -> str:
        counts = ", ".join(f"{name} {len(part)}" for name, part in self.parts.items())
        return f"Domain({self.name!r}, passages: {counts})"

    @cached_property
    def questions(self) -> Questions:
        """Multiple-choice questions, read on first access.

        They come from the domain's declared sets (any first n are a fair sample) or the
        ``questions.jsonl`` of a user's folder, in its order. Otherwise they are built from the test
        part (which of four sentences continues the text?), so they share text with the test
        perplexity, never with calibration, training or validation.
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
    """Load a shipped domain, a user's own text, or a Hugging Face dataset, in disjoint parts.

    What is skipped in a user's files is said in one warning, and in the domain's `notes`.

    Parameters
    ----------
    name_or_path : str or path
        A name (see `domain_names`); a file: ``.txt`` or ``.md`` is one text, ``.jsonl``, ``.json``,
        ``.csv`` or ``.tsv`` one in each row (a chat is one text); a folder of such files, at any
        depth; or a hub dataset id (``"user/dataset"``). A folder's ``questions.jsonl`` or ``.json``
        holds its multiple-choice questions: keys ``question``, ``choices``, ``answer`` (the right
        choice, its letter or its index), and if wanted ``context``, ``source``, ``licence``.
    column : str, optional
        Column of the text, where there are several.
    online : bool
        For a shipped domain: read the dataset that the Mini-GPTs paper used, from the hub.

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
    if isinstance(name_or_path, os.PathLike):  # "law" is a shipped domain, Path("law") a folder
        declared = {}
    entry = declared.get(name)
    if entry is not None and not online:
        return _shipped(name, entry)
    if entry is not None:
        if "hub" not in entry:
            raise ValueError(f"domain {name!r} has no online dataset; load it without online=True")
        facts = {"title": f"{entry['title']} (hub)", "question_sources": entry.get("questions", ())}
        return _build(name, *read_hub(entry["hub"]), **facts)
    path = to_path(name)
    if os.path.exists(path):  # noqa: PTH110, Path.exists may raise
        questions = find_questions(path)
        sources = [{"reader": "own", "path": str(questions)}] if questions else []
        absolute = path.resolve()  # "." has no name of its own
        own_name = absolute.name if path.is_dir() else absolute.stem
        return _build(own_name, *read_path(path, column), question_sources=sources)
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) and path.suffix.lower() not in FILES:
        hub = {"path": name, "column": column}
        return _build(name.replace("/", "-"), *read_hub(hub))
    raise ValueError(
        f"unknown domain {name!r}: not a shipped one ({suggest(name, list(declared))}), not a file "
        "or folder, not a hub id"
    )


def load_domains(names_or_paths: Iterable[str | os.PathLike]) -> list[Domain]:
    """Load several domains whose names differ.

    Results are named after a domain, and a file or folder gives it its last part.

    Parameters
    ----------
    names_or_paths : iterable of str or path
        Each as `load_domain` takes it.

    Raises
    ------
    ValueError
        If two texts that differ have the same name.
    """
    sources, domains = {}, []
    for source in ListOf(Location())("names_or_paths", names_or_paths):
        domain = load_domain(source)
        first, twin = sources.setdefault(domain.name, (source, domain))
        if twin != domain:
            raise ValueError(
                f"{str(first)!r} and {str(source)!r} are different texts, and both would be called "
                f"{domain.name!r}; rename one of them"
            )
        domains.append(domain)
    return domains


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
    name=Text(),
    documents=ListOf(Text()),
    title=Text(),
    licence=Text(),
    attribution=Text(),
    question_sources=ListOf(Instance(dict)),
)
def make_domain(
    name: str,
    documents: Iterable[str],
    *,
    title: str = "",
    licence: str = "",
    attribution: str = "",
    question_sources: Iterable[dict] = (),
) -> Domain:
    """Split documents into passages, drop near-duplicates and deal the rest into four parts.

    With 40 documents or more every document falls into one part whole; with fewer, passages do.

    Parameters
    ----------
    name : str
        Name of the domain, its parts and its results.
    documents : iterable of str
        Texts of any length.
    title, licence, attribution : str, optional
        What it is and who may use it.
    question_sources : iterable of dict, optional
        Sources of multiple-choice questions; by default they are built from the test part.

    Raises
    ------
    ValueError
        If there are fewer passages than parts.
    """
    facts = {"title": title, "licence": licence, "attribution": attribution}
    return _build(name, documents, **facts, question_sources=question_sources)


def _build(
    name: str,
    documents: Iterable[str],
    notes: Sequence[str] | None = None,
    *,
    title: str = "",
    question_sources: Iterable[dict] = (),
    **facts: str,
) -> Domain:
    """A domain of documents; `notes` on a user's files (None: they are no files) become a warning.

    Documents are split into passages; blocks of passages, which are kept together, into parts.
    """
    name = characters(name)
    if not name.strip():
        raise invalid("name", name, "a name for the domain")
    blocks, dropped = split_documents(documents)
    more = "".join(f"; {note}" for note in notes or ())
    if not blocks:
        raise ValueError(f"domain {name!r} is empty: no text found{more}")
    if len(blocks) < len(PARTS):
        raise ValueError(
            f"domain {name!r:.60} has {len(blocks)} passage(s) of about {PASSAGE_WORDS} words; "
            f"four disjoint parts need at least 4: give more text{more}"
        )
    if notes is not None and dropped:
        total = dropped + sum(map(len, blocks))
        again = f"dropped {dropped} of {total} passages, which nearly repeat earlier ones"
        notes = [*notes, again]
    if notes:
        warnings.warn(f"domain {name!r}: {'; '.join(notes)}", stacklevel=4)
    others: dict[str, Any] = {"licence": "", "attribution": "", **facts}
    others |= {"question_sources": tuple(question_sources), "notes": tuple(notes or ())}
    return Domain(name, title or name, **others, **_parts(name, deal(blocks)), dropped=dropped)


def _parts(name: str, passages: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    return {part: Part(name, part, tuple(passages[part])) for part in PARTS}


def _shipped(name: str, entry: dict) -> Domain:
    """A declared domain, from the cache or (on first use) from its sources."""
    pins = [pinned_packages()[s["package"]].sha256 for s in entry["texts"] if "package" in s]
    local = [(DATA / s["member"]).read_text() for s in entry["texts"] if "package" not in s]
    facts: dict[str, Any] = {key: entry[key] for key in ("title", "licence", "attribution")}
    facts["question_sources"] = tuple(entry.get("questions", ()))

    def build() -> dict:
        documents = [document for source in entry["texts"] for document in read_source(source)]
        domain = make_domain(name, documents, **facts)
        return {**{part: list(p) for part, p in domain.parts.items()}, "dropped": domain.dropped}

    key = cache_key(_VERSION, entry["texts"], pins, local)
    stored = cached(cache_folder() / "domains" / f"{name}-{key[:12]}.json", build)
    return Domain(name, **facts, **_parts(name, stored), dropped=stored["dropped"], checked=True)
