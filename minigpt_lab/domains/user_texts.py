"""A user's own texts: which files of a folder hold texts, and which column of a table does."""

from __future__ import annotations

import io
import os
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from ..checks import first_line, suggest
from ..models import SIDECAR
from ..store import is_result, parse_json, read_json, read_text

_TEXTS = (".txt", ".text", ".md", ".markdown", ".rst")
_ROWS = (".jsonl", ".ndjson", ".json")
_TABLES = (".csv", ".tsv")
FILES = (*_TEXTS, *_ROWS, *_TABLES)
QUESTIONS = ("questions.jsonl", "questions.json")  # asked, never read as text
_CHATS = ("messages", "conversations", "conversation", "dialogue", "dialog")
_PAIRS = (  # columns of one text, in its order; between the first and the last any may be absent
    ("prompt", "response"),
    ("prompt", "completion"),
    ("instruction", "input", "output"),
    ("instruction", "input", "response"),
)
_HEADER = 60  # characters; what is longer names no column


def skipped_note(skipped: Mapping[str, Sequence[str]]) -> list[str]:
    """A note on the names of skipped things, by the reason; none if nothing was skipped."""
    clauses = []
    for reason, names in skipped.items():
        distinct = list(dict.fromkeys(names))
        some = ", ".join(distinct[:3] + ["…"] * (len(distinct) > 3))
        clauses += [f"{reason} ({len(names):,}: {some})"] if names else []
    return [f"skipped {', '.join(clauses)}"] if clauses else []


def find_questions(folder: Path) -> Path | None:
    """The file of multiple-choice questions in a folder, whatever the case of its name."""
    if not folder.is_dir():
        return None
    found = (each for each in sorted(folder.iterdir()) if each.name.lower() in QUESTIONS)
    return next(filter(os.path.isfile, found), None)  # noqa: PTH113, is_file may raise


def read_path(path: Path, column: str | None) -> tuple[list[str], list[str]]:
    """Documents of a user's own file or folder, and what is to be said about them.

    Of a folder every file in it and below is read that is a text or a table, links followed once.
    Hidden files and folders, backups of editors, files of other kinds, and models and runs of this
    package are skipped.

    Parameters
    ----------
    path : pathlib.Path
        A text (``.txt``, ``.md``, …) is one document, a table (``.jsonl``, ``.json``, ``.csv``,
        ``.tsv``) one for each row.
    column : str, optional
        Of the tables; by default ``text``, a chat (``messages``), a prompt and its response, or
        the only column of texts.

    Returns
    -------
    documents, notes : list of str

    Raises
    ------
    ValueError
        If a file cannot be read, or its column of texts cannot be told.
    """
    skipped: dict[str, list[str]] = defaultdict(list)
    documents, joined, tables = [], {}, 0
    for file in _walk(path, skipped) if path.is_dir() else [path]:
        kind = file.suffix.lower()
        name = file.name if file == path else file.relative_to(path).as_posix()
        if kind not in FILES:
            raise ValueError(f"{file}: expected a file of {', '.join(FILES)}, got {kind or 'none'}")
        text = read_text(file)
        if not text.strip():
            skipped["files without text"].append(name)
        elif kind in _TEXTS:
            documents.append(text)
        else:
            tables += 1
            rows = _cells(text, file) if kind in _TABLES else [*json_rows(text, file).values()]
            texts, columns = row_texts(rows, column and [column], str(file))
            if any(texts):
                documents += filter(None, texts)
                skipped["rows without text"] += [name] * texts.count("")
            else:
                skipped["tables without a column of texts"].append(name)
            if len(columns) > 1:
                joined[f"read {' and '.join(columns)} of each row as one text"] = True
    if column is not None and documents and not tables:
        raise ValueError(f"column is {column!r}, but {path} holds no table; leave column out")
    return documents, skipped_note(skipped) + list(joined)


def _walk(root: Path, skipped: Mapping[str, list[str]]) -> Iterator[Path]:
    """Files of texts in a folder and below, in the order of their names."""
    seen = set()
    unreadable = skipped["folders that cannot be read"]
    for place, folders, names in os.walk(
        root, onerror=lambda error: unreadable.append(error.filename), followlinks=True
    ):
        real = os.path.realpath(place)
        if real in seen:  # a link to a folder read before, or around it
            folders.clear()
            continue
        seen.add(real)
        if Path(place) != root and _is_of_this_package(place, names):
            skipped["folders that this package wrote"].append(os.path.relpath(place, root))
            folders.clear()
            continue
        hidden = {name for name in (*folders, *names) if _is_hidden(name)}
        skipped["hidden files, folders and backups"] += sorted(hidden)
        folders[:] = sorted(set(folders) - hidden)
        for name in sorted(set(names) - hidden):
            path = Path(place, name)
            questions = name.lower() in QUESTIONS
            if path.suffix.lower() not in FILES or (questions and path.parent != root):
                skipped["files of other kinds"].append(name)
            elif not os.path.isfile(path):  # noqa: PTH113, is_file may raise
                skipped["links to nothing, pipes or devices"].append(name)
            elif not questions:
                yield path


def _is_of_this_package(place: str, names: Sequence[str]) -> bool:
    """Whether a folder holds a saved model, or the state of a run such as `make_mini`'s.

    Its tables are no texts, and each further call would read more of them.
    """
    if SIDECAR in names:
        return True
    try:
        return is_result(read_json(Path(place, "state.json")))
    except (ValueError, OSError):
        return False


def _is_hidden(name: str) -> bool:
    """Whether a file or folder is hidden, or left by an editor or archiver beside the real one."""
    marked = name.startswith((".", "~$")) or name.endswith("~") or name == "__MACOSX"
    return marked or (name.startswith("#") and name.endswith("#"))


def json_rows(text: str, file: Path) -> dict[str, object]:
    """Rows of a JSON file by their place: a value per line, or one array, also inside an object."""
    try:
        value = parse_json(text)
    except ValueError as error:
        return _json_lines(text, file, error)
    if isinstance(value, Mapping) and len(value) == 1 and not {*value} & {*_CHATS}:
        [inner] = value.values()
        value = inner if isinstance(inner, list) else value
    if not isinstance(value, list):
        return {"line 1": value}
    where = "" if "\n" in text.strip() else "line 1, "
    return {f"{where}entry {number}": row for number, row in enumerate(value, 1)}


def _json_lines(text: str, file: Path, error: ValueError) -> dict[str, object]:
    """A value per line; `error` says why the file is not one value."""
    rows = {}
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            rows[f"line {number}"] = parse_json(line)
        except ValueError as wrong:
            one = file.suffix.lower() == ".json" and not rows  # of several lines
            reason = error if one else f"{file.name}, line {number}: {wrong}"
            raise ValueError(f"{file} cannot be read as {file.suffix} ({reason})") from None
    return rows


def _cells(text: str, file: Path) -> list[dict[str, str]]:
    """Rows of a table with a header line, separated by commas, semicolons or tabs."""
    first = text.lstrip().partition("\n")[0]
    separator = "\t" if file.suffix.lower() == ".tsv" else max(",;\t", key=first.count)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)  # more cells than columns
            # all cells are strings, also those that pandas takes for numbers or missing ones
            table = pd.read_csv(
                io.StringIO(text), sep=separator, dtype=str, keep_default_na=False, index_col=False
            )
    except (pd.errors.ParserError, pd.errors.ParserWarning) as error:
        raise ValueError(
            f"{file} cannot be read as {file.suffix} ({first_line(error)}); put a text that holds "
            f"{separator!r} in quotes"
        ) from None
    table.columns = table.columns.str.strip()
    if max(map(len, table.columns)) > _HEADER:
        raise ValueError(f"{file}: its first line is no header with a name for every column")
    return table.to_dict("records")


def row_texts(
    rows: list, columns: Sequence[str] | None, what: str
) -> tuple[list[str], Sequence[str]]:
    """The text of every row (empty where it has none), and the columns that it is read from.

    Parameters
    ----------
    rows : list
        Mappings, or texts themselves.
    columns : sequence of str, optional
        To join by a line break; by default those that `read_path` names.
    what : str
        The table, for errors.

    Raises
    ------
    ValueError
        If a column is missing, or there are several to choose from.
    """
    tables = [row for row in rows if isinstance(row, Mapping)]
    names = list(dict.fromkeys(key for row in tables for key in row))
    for name in columns or ():
        if name not in names:
            raise ValueError(f"{what} has no column {name!r}; {suggest(name, names)}")
    columns = columns or _text_columns(tables, names, what)
    return [_row_text(row, columns) for row in rows], columns


def _text_columns(tables: list[Mapping], names: list[str], what: str) -> tuple[str, ...]:
    """Columns that make up a row's text; () if none holds texts."""
    texts = [name for name in names if any(_is_text(row.get(name)) for row in tables)]
    for name in (*(n for n in texts if n.lower() == "text"), *(c for c in _CHATS if c in texts)):
        return (name,)
    for pair in _PAIRS:
        if {pair[0], pair[-1]} <= set(texts):
            return tuple(name for name in pair if name in texts)
    if len(texts) > 1:
        raise ValueError(f"{what}: say which column holds the text (column=…): {', '.join(texts)}")
    return tuple(texts)


def _is_text(value: Any) -> bool:
    """Whether a cell holds words: no number, no empty string."""
    try:
        float(value)
    except (TypeError, ValueError):
        return bool(_said(value))
    return False


def _row_text(row: object, columns: Iterable[str]) -> str:
    """The text of a row; empty where it has none."""
    if not isinstance(row, Mapping):
        return _said(row)
    return "\n".join(filter(None, (_said(row.get(name)) for name in columns)))


def _said(value: object) -> str:
    """A text; what all turns of a chat say, a paragraph each; empty for anything else."""
    if isinstance(value, str):
        return value if value.strip() else ""
    if isinstance(value, Mapping):  # a turn, or a part of one
        return next((_said(value[k]) for k in ("content", "value", "text") if k in value), "")
    return "\n\n".join(filter(None, map(_said, value))) if isinstance(value, list) else ""
