"""A user's files: only regular ones are read, in the encoding they declare."""

from __future__ import annotations

import codecs
import json
import os
import stat
from pathlib import Path

_MARKS = (  # byte order marks; UTF-32's begins like UTF-16's
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


def is_regular(path: str | os.PathLike) -> bool:
    """Whether a path leads to a regular file: no folder, pipe, socket or device."""
    try:
        return stat.S_ISREG(Path(path).stat().st_mode)
    except (OSError, ValueError):
        return False


def read_bytes(path: str | os.PathLike) -> bytes:
    """Content of a regular file; reading never waits for a pipe or a device.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is not a regular file or cannot be read.
    """
    try:
        if not stat.S_ISREG(Path(path).stat().st_mode):
            raise ValueError(f"{path} is not a regular file but a folder, a pipe or a device")
        return Path(path).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"no file {path}") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None


def read_text(path: str | os.PathLike) -> str:
    r"""Text of a file in UTF-8, or in UTF-16 or UTF-32 with a byte order mark; lines end in ``\n``.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it cannot be read, has another encoding or is not text.
    """
    content = read_bytes(path)
    mark, encoding = next((m for m in _MARKS if content.startswith(m[0])), (b"", "utf-8"))
    try:
        text = content[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        place = f"byte {error.start + len(mark):,} is no text in {encoding.upper()}"
        raise ValueError(
            f"{path} cannot be read as {Path(path).suffix or 'text'} in UTF-8 ({place}); save it "
            "as UTF-8"
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


def read_user_json(path: str | os.PathLike) -> object:
    """Content of a JSON file.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it cannot be read or is not JSON.
    """
    text = read_text(path)
    try:
        return parse_json(text)
    except ValueError as error:
        raise ValueError(f"{path} is cut short or no JSON ({error})") from None
