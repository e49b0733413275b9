"""Numbers that took long to compute: one JSON line each, found again by what they came from."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from ..checks import as_json, file_to_read, file_to_write
from .storage import Damaged, explained, kept, make_folder, returned_anyway


class Ledger:
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
        self.path = None if path is None else file_to_write(path).absolute()
        self.found: dict[str, dict] = {}
        if self.path is not None:
            self.found = kept(self.path, _read, ".jsonl") or {}

    def get(self, recipe: object, compute: Callable[[], dict]) -> dict:
        """The result of a recipe: from the file if it is there, else computed and written.

        Parameters
        ----------
        recipe : object
            All that the result depends on, as plain data.
        compute : callable
            Gives the result, as plain data.
        """
        key = content_hash([json.dumps(as_json(recipe), sort_keys=True)])
        if key not in self.found:
            self.found[key] = compute()
            if self.path is not None:
                # a line of its own, also after one that was cut off
                line = "\n" + json.dumps({"key": key, "found": self.found[key]})
                with returned_anyway("a result is"), explained(self.path):
                    make_folder(self.path.parent)
                    with self.path.open("a", encoding="utf-8") as file:
                        file.write(line)
        return self.found[key]


def _read(path: Path) -> dict[str, dict]:
    """Results by key; one line says how many lines of a file could not be read."""
    rows, unreadable = [], 0
    for line in file_to_read(path).read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            rows += [json.loads(line)] if line.strip() else []
        except (ValueError, RecursionError):
            unreadable += 1  # left behind by an interrupted write
    found = {
        row["key"]: row["found"]
        for row in rows
        if isinstance(row, dict) and row.keys() >= {"key", "found"}
        if isinstance(row["key"], str) and isinstance(row["found"], dict)
    }
    if rows and not found:
        raise ValueError(f"{path} holds no results: its lines say something else")
    if unreadable and not found:
        raise Damaged(f"{path} holds no results: none of its {unreadable} lines can be read")
    if unreadable:
        warnings.warn(
            f"{path}: {unreadable} lines cannot be read; what they held is computed again",
            stacklevel=4,
        )
    return found


def content_hash(texts: Sequence[str]) -> str:
    """SHA-256 of a sequence of texts."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()
