"""One cache for everything that took long, found again by a hash of all that it depends on.

Results lie in files that are written whole or not at all: plain data as JSON with its hash, arrays
as safetensors (`cached`), many small results in one file (`ResultCache`). A damaged file is set
aside with a warning and computed again. Where the disk is full, the result is returned anyway.
"""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from platformdirs import user_cache_path

from ..checks import InvalidArgument, as_json, to_path, writable_file, writable_folder
from .atomic import undo_interrupted_write
from .disk_errors import warn_if_unsaved
from .text_files import DamagedFile, content_hash, read_json, write_json

Result = TypeVar("Result")


def cache_folder() -> Path:
    """Folder for downloads and conversions: ``MINIGPT_LAB_CACHE``, or the user's cache folder.

    Raises
    ------
    PermissionError
        If the folder cannot be created or written.
    """
    folder = to_path(os.environ.get("MINIGPT_LAB_CACHE") or user_cache_path("minigpt_lab"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise PermissionError(
            f"cache folder {folder} cannot be written ({error.strerror}); "
            "set MINIGPT_LAB_CACHE to a folder that can"
        ) from error
    return folder


def cache_key(*facts: object) -> str:
    """Hex SHA-256 of all that a result depends on, as plain data.

    Raises
    ------
    InvalidArgument
        For anything else, which two results that differ may have in common: a function, a model.
    """
    return content_hash([json.dumps({"facts": as_json(facts, _no_plain_data)}, sort_keys=True)])


def _no_plain_data(value: object) -> str:
    raise InvalidArgument(
        f"{getattr(value, '__name__', type(value).__name__)} is no plain data, so results that are "
        "kept could not be told apart by it; give numbers, strings or lists of them"
    )


def read_cached(
    path: str | os.PathLike, read: Callable[[Path], Result], *, folder: bool = False
) -> Result | None:
    """Return what an earlier call wrote; None if there is nothing yet or it is damaged.

    Parameters
    ----------
    path : str or path
        Where the result will be written; asked before the work begins.
    read : callable
        Reads it; raises `DamagedFile` if it is ours and cannot be read (it is then set aside),
        another ValueError for anything else.
    folder : bool
        Whether the result is a folder, not a file.

    Raises
    ------
    FileExistsError
        If it is something else: it is left alone.
    UnusablePath
        If the path cannot be written.
    """
    path = undo_interrupted_write(writable_folder(path) if folder else writable_file(path))
    if not path.exists() or not path.stat().st_size:
        return None
    try:
        return read(path)
    except DamagedFile as error:
        set_aside(path, str(error.__cause__ or error))
        return None
    except ValueError as error:
        raise FileExistsError(f"{error}; it is left alone: choose another path") from error


def set_aside(path: Path, reason: str) -> None:
    """Rename a damaged file or folder, with a warning; what it held is made anew."""
    number = 1
    while os.path.lexists(aside := path.with_name(f"{path.name}.damaged-{number}")):
        number += 1
    try:
        path.rename(aside)
        done = f"set aside as {aside.name}"
    except OSError as error:
        done = f"left there ({error.strerror})"
    warnings.warn(
        f"{path} is damaged ({reason}): {done}, and what it held is made anew", stacklevel=5
    )


def read_result(path: Path) -> Any:
    """Read what `write_result` wrote.

    Raises
    ------
    DamagedFile
        If its content is no longer what was written.
    ValueError
        If the file holds something else.
    """
    content = read_json(path)
    if not is_result(content):
        raise ValueError(f"{path} holds something else")
    if content["sha256"] != cache_key(content["result"]):
        raise DamagedFile(f"{path} is not what was written")
    return content["result"]


def is_result(content: object) -> bool:
    """Whether this is the content of a file of `write_result`, perhaps damaged."""
    return isinstance(content, dict) and content.keys() == {"sha256", "result"}


def write_result(result: object, path: Path) -> None:
    """Write plain data with its hash, whole or not at all."""
    write_json(path, {"sha256": cache_key(result), "result": result})


def cached(
    path: str | os.PathLike | None,
    compute: Callable[[], Result],
    read: Callable[[Path], Any] = read_result,
    write: Callable[[Result, Path], object] = write_result,
    is_current: Callable[[Result], bool] = lambda _: True,
) -> Result:
    """Return the result in a file, or compute it and write it there.

    Parameters
    ----------
    path : str or path, optional
        Of the file: named by a `cache_key`, or by a user; None computes.
    compute : callable
        Gives the result.
    read, write : callable
        Take ``(path)`` and ``(result, path)``; `read` is as for `read_cached`. By default the
        result is plain data, written as JSON with its hash.
    is_current : callable
        Whether a result that was read is the one asked for, where the file's name does not tell.

    Raises
    ------
    FileExistsError
        If the file is something else: it is left alone.
    """
    if path is None:
        return compute()
    result = read_cached(path, read)
    if result is not None and is_current(result):
        return result
    result = compute()
    with warn_if_unsaved():
        write(result, to_path(path))
    return result


class ResultCache:
    """Results in one JSON file, each found by its key; a killed run continues where it was.

    The file is written anew with every result. One that cannot be written is returned all the same.

    Parameters
    ----------
    path : str or path, optional
        Of the file; by default results are kept in memory only.

    Raises
    ------
    FileExistsError
        If it holds something else: it is left alone.
    OSError
        If it cannot be written.
    """

    def __init__(self, path: str | os.PathLike | None = None):
        self.path = None if path is None else writable_file(path).absolute()
        self._results: dict[str, dict] = {}
        if self.path is not None:
            self._results = read_cached(self.path, read_result) or {}

    def get(self, facts: object, compute: Callable[[], dict]) -> dict:
        """Return a result: from the file if it is there, else computed and written.

        Parameters
        ----------
        facts : object
            All that the result depends on, as plain data.
        compute : callable
            Gives the result, as plain data.
        """
        key = cache_key(facts)
        if key not in self._results:
            self._results[key] = compute()
            if self.path is not None:
                with warn_if_unsaved():
                    write_result(self._results, self.path)
        return self._results[key]
