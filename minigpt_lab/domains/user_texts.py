"""A user's own texts: which files of a folder hold texts, and which column of a table does."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..checks import suggest
from ..store import parse_json, read_text

_TEXTS = (".txt", ".text", ".md", ".markdown", ".rst")
_ROWS = (".jsonl", ".ndjson", ".json")
_TABLES = (".csv", ".tsv")
FILES = (*_TEXTS, *_ROWS, *_TABLES)
_KINDS = f"a .txt, .jsonl or .csv file (or {', '.join(FILES)})"
QUESTIONS = ("questions.jsonl", "questions.json")  # asked, never read as text
_CHATS = ("messages", "conversations", "conversation", "dialogue", "dialog")
_PAIRS = (  # columns of one text, in its order; those in brackets may be absent
    ("prompt", "response"),
    ("prompt", "completion"),
    ("instruction", "(input)", "output"),
    ("instruction", "(input)", "response"),
)
_HEADER = 60  # characters; what is longer names no column


class Skipped(dict[str, list[str]]):
    """Names of skipped things by the reason; its text is one clause of a sentence."""

    def add(self, reason: str, *names: str) -> None:
        """Note names under a reason, such as ``files of other kinds``."""
        self.setdefault(reason, []).extend(names)

    def __str__(self) -> str:
        clauses = []
        for reason, names in self.items():
            distinct = list(dict.fromkeys(names))
            some = ", ".join(distinct[:3] + ["…"] * (len(distinct) > 3))
            clauses += [f"{reason} ({len(names):,}: {some})"] if names else []
        return ", ".join(clauses)


def find_questions(folder: Path) -> Path | None:
    """The file of multiple-choice questions in a folder, whatever the case of its name."""
    if not folder.is_dir():
        return None
    found = (each for each in sorted(folder.iterdir()) if each.name.lower() in QUESTIONS)
    return next(filter(os.path.isfile, found), None)  # noqa: PTH113, is_file may raise


def read_path(path: Path, column: str | None) -> tuple[list[str], list[str]]:
    """Documents of a user's own file or folder, and what is to be said about them.

    Of a folder every file in it and below is read that is a text or a table, links followed once.
    Hidden files and folders, backups of editors and files of other kinds are skipped.

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
    FileNotFoundError
        If a folder holds no text.
    ValueError
        If a file cannot be read, or its column of texts cannot be told.
    """
    skipped, remarks, documents, tables = Skipped(), [], [], 0
    folder = path.is_dir()
    files = list(_walk(path, skipped)) if folder else [path]
    for file in files:
        kind, name = file.suffix.lower(), file.relative_to(path).as_posix() if folder else ""
        if kind not in FILES:
            raise ValueError(f"{file}: expected {_KINDS}, got {kind or 'none'!r}")
        text = read_text(file)
        if not text.strip():
            skipped.add("files without text", name or file.name)
            continue
        if kind in _TEXTS:
            documents.append(text)
            continue
        tables += 1
        rows = _cells(text, file) if kind in _TABLES else [*json_rows(text, file).values()]
        try:
            texts, columns = row_texts(rows, column and [column], str(file))
        except NoTexts:
            if not folder:
                raise
            skipped.add("tables without a column of texts", name)
            continue
        documents += filter(None, texts)
        skipped.add("rows without text", *[name or file.name] * texts.count(""))
        if len(columns) > 1:
            remarks.append(f"read {' and '.join(columns)} of each row as one text")
    if column is not None and files and not tables:
        raise ValueError(f"column is {column!r}, but {path} holds no table; leave column out")
    notes = [f"skipped {skipped}"] if str(skipped) else []
    if not documents and folder:
        more = f" ({notes[0]})" if notes else ""
        raise FileNotFoundError(f"{path} holds no .txt, .jsonl or .csv file with text{more}")
    return documents, notes + list(dict.fromkeys(remarks))


def _walk(root: Path, skipped: Skipped) -> Iterator[Path]:
    """Files of texts in a folder and below, in the order of their names."""
    seen = set()

    def unreadable(error: OSError) -> None:
        skipped.add("folders that cannot be read", Path(error.filename).name)

    for place, folders, names in os.walk(root, onerror=unreadable, followlinks=True):
        here = Path(place).stat()
        if (here.st_dev, here.st_ino) in seen:  # a link to a folder read before, or around it
            folders.clear()
            continue
        seen.add((here.st_dev, here.st_ino))
        hidden = [name for name in (*folders, *names) if _is_hidden(name)]
        skipped.add("hidden files, folders and backups", *sorted(hidden))
        folders[:] = sorted(set(folders) - set(hidden))
        for name in sorted(set(names) - set(hidden)):
            path = Path(place, name)
            if path.suffix.lower() not in FILES:
                skipped.add("files of other kinds", name)
            elif not os.path.isfile(path):  # noqa: PTH113, is_file may raise
                skipped.add("links to nothing, pipes or devices", name)
            elif name.lower() not in QUESTIONS:
                yield path
            elif path.parent != root:
                skipped.add(
                    "files of questions in folders below", path.relative_to(root).as_posix()
                )


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
    limit = csv.field_size_limit(len(text) + 1)
    try:
        reader = csv.reader(
            io.StringIO(text.lstrip(), newline=""), strict=True, delimiter=separator
        )
        header, rows = [name.strip() for name in next(reader)], []
        if len(set(header)) < len(header) or max(map(len, header)) > _HEADER:
            raise ValueError(f"{file}: its first line is no header with a name for every column")
        for cells in filter(None, reader):
            if len(cells) > len(header):
                raise ValueError(
                    f"{file}, line {reader.line_num}: {len(cells)} cells, but the header names "
                    f"{len(header)}; put a text that holds {separator!r} in quotes"
                )
            rows.append(dict(zip(header, cells, strict=False)))
    except csv.Error as error:
        raise ValueError(
            f"{file} cannot be read as {file.suffix} (line {reader.line_num}: {error})"
        ) from None
    finally:
        csv.field_size_limit(limit)
    return rows


class NoTexts(ValueError):
    """A table has no column of texts."""


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
    NoTexts
        If no column holds texts.
    ValueError
        If a column is missing, or there are several to choose from.
    """
    tables = [row for row in rows if isinstance(row, Mapping)]
    names = list(dict.fromkeys(key for row in tables for key in row))
    for name in columns or ():
        if name not in names:
            raise ValueError(f"{what} has no column {name!r}; {suggest(name, names)}")
    if names and columns is None:
        columns = _text_columns(tables, names, what)
    texts = [_row_text(row, columns or ()) for row in rows]
    if not any(texts):
        raise NoTexts(
            f"{what} has no column of texts; its columns are {', '.join(names)}: is the first "
            "line a header?"
        )
    return texts, columns or ()


def _text_columns(tables: list[Mapping], names: list[str], what: str) -> tuple[str, ...]:
    """Columns that make up a row's text; () if none holds texts."""
    texts = [name for name in names if any(_is_text(row.get(name)) for row in tables)]
    for name in (*(n for n in texts if n.lower() == "text"), *(c for c in _CHATS if c in texts)):
        return (name,)
    for pair in _PAIRS:
        needed = {name for name in pair if name[0] != "("}
        if needed <= set(texts):
            return tuple(n for n in (name.strip("()") for name in pair) if n in texts)
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
