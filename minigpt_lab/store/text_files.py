"""Text and JSON files: only regular files are read, in the encoding that they declare."""

from __future__ import annotations

import codecs
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..checks import readable_file
from .atomic import atomic_write

_MARKS = {  # byte order marks; UTF-32's begins like UTF-16's
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}


class DamagedFile(ValueError):
    """A file of the package that cannot be read whole."""


def damaged_file(path: Path, suffix: str, message: str) -> ValueError:
    """Error for a file that cannot be read; `DamagedFile` only if its name ends as ours do."""
    return (DamagedFile if path.suffix == suffix else ValueError)(message)


def read_text(path: str | os.PathLike) -> str:
    r"""Text of a file in UTF-8, or in UTF-16 or UTF-32 with a byte order mark; lines end in ``\n``.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is no regular file (reading never waits for a pipe), has another encoding or is no
        text.
    """
    content = readable_file(path).read_bytes()
    mark = next((mark for mark in _MARKS if content.startswith(mark)), b"")
    encoding = _MARKS.get(mark, "utf-8")
    try:
        text = content[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} cannot be read as {Path(path).suffix or 'text'} in UTF-8 (byte "
            f"{error.start + len(mark):,} is no text in {encoding.upper()}); save it as UTF-8"
        ) from None
    if "\0" in text:
        raise ValueError(f"{path} holds NUL characters: it is not text; save it as UTF-8")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def parse_json(text: str) -> object:
    """A JSON value.

    Raises
    ------
    ValueError
        If it is not JSON, or nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json(path: str | os.PathLike) -> Any:
    """Content of a JSON file.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    DamagedFile
        If it cannot be read or is no JSON; a plain ValueError if its name does not end in .json.
    """
    path = readable_file(path)
    try:
        return parse_json(read_text(path))
    except ValueError as error:
        reason = str(error).removeprefix(f"{path} ")
        raise damaged_file(path, ".json", f"{path} is cut short or no JSON ({reason})") from error


def write_json(path: Path, content: object, indent: int | None = None) -> Path:
    """Write a JSON file whole or not at all."""
    text = json.dumps(content, ensure_ascii=False, indent=indent)
    with atomic_write(path) as staging:
        staging.write_text(text, encoding="utf-8")
    return path


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_hash(texts: Sequence[str]) -> str:
    """Hex SHA-256 of a sequence of texts."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()
