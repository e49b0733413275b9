"""Numbers that took long to compute: one JSON line each, found again by what they came from."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from ..checks import as_json, readable_file, writable_file
from .storage import DamagedFile, explain_disk_errors, make_folder, read_cached, warn_if_unsaved


class ResultCache:
    """Finished results in a file of JSON lines; a run that was killed goes on where it was.

    Lines that cannot be read are computed again; results that cannot be written are returned.

    Parameters
    ----------
    path : str or path, optional
        The file; by default results are kept in memory only.

    Raises
    ------
    FileExistsError
        If it holds something else: it is left alone.
    OSError
        If it cannot be written.
    """

    def __init__(self, path: str | os.PathLike | None = None):
        self.path = None if path is None else writable_file(path).absolute()
        self.results: dict[str, dict] = {}
        if self.path is not None:
            self.results = read_cached(self.path, _read, ".jsonl") or {}

    def get(self, cache_key: object, compute: Callable[[], dict]) -> dict:
        """The result of a cache key: from the file if it is there, else computed and written.

        Parameters
        ----------
        cache_key : object
            All that the result depends on, as plain data.
        compute : callable
            Gives the result, as plain data.
        """
        key = content_hash([json.dumps(as_json(cache_key), sort_keys=True)])
        if key not in self.results:
            self.results[key] = compute()
            if self.path is not None:
                # a line of its own, also after one that was cut off
                line = "\n" + json.dumps({"key": key, "result": self.results[key]})
                with warn_if_unsaved("a result is"), explain_disk_errors(self.path):
                    make_folder(self.path.parent)
                    with self.path.open("a", encoding="utf-8") as file:
                        file.write(line)
        return self.results[key]


def _read(path: Path) -> dict[str, dict]:
    """Results by key; one line says how many lines of a file could not be read."""
    rows, unreadable = [], 0
    for line in readable_file(path).read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            rows += [json.loads(line)] if line.strip() else []
        except (ValueError, RecursionError):
            unreadable += 1  # left behind by an interrupted write
    found = {
        row["key"]: row["result"]
        for row in rows
        if isinstance(row, dict) and row.keys() >= {"key", "result"}
        if isinstance(row["key"], str) and isinstance(row["result"], dict)
    }
    if rows and not found:
        raise ValueError(f"{path} holds no results: its lines say something else")
    if unreadable and not found:
        raise DamagedFile(f"{path} holds no results: none of its {unreadable} lines can be read")
    if unreadable:
        warnings.warn(
            f"{path}: {unreadable} lines cannot be read; what they held is computed again",
            stacklevel=4,
        )
    return found


def content_hash(texts: Sequence[str]) -> str:
    """SHA-256 of a sequence of texts."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()
