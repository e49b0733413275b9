"""Paths as users mean them, and whether they can be read or written: asked before long work."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path


class UnusablePath(OSError, ValueError):
    """A path that cannot be read or written as asked."""


def to_path(path: str | os.PathLike) -> Path:
    """The path that a user means: a leading ``~`` is the home folder, as in a shell.

    Raises
    ------
    UnusablePath
        If it is blank, of bytes, holds a null character, or is no name that a file can have.
    """
    text = os.fspath(path)
    if not isinstance(text, str) or not text.strip() or "\0" in text:
        raise UnusablePath(f"{text!r} is no path; expected text without null characters")
    try:
        os.lstat(text)
    except UnicodeEncodeError:
        raise UnusablePath(f"{text!r:.60} is no path; expected Unicode text") from None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise UnusablePath(f"{text!r:.60}… is too long for a path") from None
    return Path(os.path.expanduser(text))  # noqa: PTH111, an unknown user's name stays as it is


def writable_file(path: str | os.PathLike) -> Path:
    """The path of a file that can be written, or written anew; asked before long work begins.

    Raises
    ------
    UnusablePath
        If it is a folder, a device or read-only, or its folder cannot be made or written.
    """
    return _writable(path, stat.S_ISREG, os.W_OK, "file")


def writable_folder(path: str | os.PathLike) -> Path:
    """The path of a folder that can be made or written into; asked before long work begins.

    Raises
    ------
    UnusablePath
        If it is a file, or cannot be made or written.
    """
    return _writable(path, stat.S_ISDIR, os.W_OK | os.X_OK, "folder")


def _writable(
    path: str | os.PathLike, is_kind: Callable[[int], bool], access: int, kind: str
) -> Path:
    final = to_path(path)
    require_creatable(final)
    seen = _stat(final)
    slash = os.fspath(path).endswith(("/", os.sep)) and kind == "file"
    if slash or (seen and not is_kind(seen.st_mode)):
        raise UnusablePath(f"{path} is no {kind} and never replaced by one; choose another path")
    if seen and _is_denied(final, access, seen):
        raise UnusablePath(f"{final} is read-only; make it writable or choose another path")
    return final


def _stat(path: Path) -> os.stat_result | None:
    """Stat of a path, None if there is none; read once, as another process may replace the file."""
    try:
        return path.stat()
    except OSError:
        return None


def _is_denied(path: Path, access: int, seen: os.stat_result) -> bool:
    """Whether access is denied to what was seen, which has not been replaced or removed since."""
    if os.access(path, access):
        return False
    still = _stat(path)
    return still is not None and (still.st_ino, still.st_ctime) == (seen.st_ino, seen.st_ctime)


def readable_file(path: str | os.PathLike) -> Path:
    """The path of a file that can be opened.

    Raises
    ------
    FileNotFoundError
        If there is none.
    UnusablePath
        If it is a folder, pipe or device (opening a pipe would wait for a writer).
    """
    final = to_path(path)
    if not final.exists():
        raise FileNotFoundError(f"{final} does not exist; give the path that it was saved under")
    if not final.is_file():
        raise UnusablePath(f"{final} is no file; give the path that it was saved under")
    if not os.access(final, os.R_OK):
        raise UnusablePath(f"{final} may not be read; make it readable or give another path")
    return final


def require_creatable(final: Path) -> None:
    """Refuse a path whose folders cannot be made, or that has a name the system does not take."""
    try:
        final.stat()
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR):
            raise UnusablePath(
                f"{final} cannot be written ({os.strerror(error.errno or 0)}); choose another path"
            ) from error
    parent = next(folder for folder in final.absolute().parents if os.path.lexists(folder))
    seen = _stat(parent)
    if seen and not stat.S_ISDIR(seen.st_mode):
        raise UnusablePath(f"{parent} is a file, so {final} cannot be in it; choose another path")
    if seen and _is_denied(parent, os.W_OK | os.X_OK, seen):
        raise UnusablePath(
            f"{parent} is read-only, so {final} cannot be written; choose another path"
        )
