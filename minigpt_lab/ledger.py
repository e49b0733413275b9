"""Numbers that took long to compute: one JSON line each, found again by what they came from."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path


class Ledger:
    """Finished results in a file of JSON lines; a run that was killed goes on where it was.

    Parameters
    ----------
    path : str or path, optional
        The file; by default results are kept in memory only.
    """

    def __init__(self, path: str | os.PathLike | None = None):
        self.path = None if path is None else Path(path)
        self.found: dict[str, dict] = {}
        if self.path is not None and self.path.is_file():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                try:
                    row = json.loads(line)
                    self.found[row["key"]] = row["found"]
                except (json.JSONDecodeError, TypeError, KeyError):
                    continue  # empty, or left behind by an interrupted write

    def get(self, recipe: object, compute: Callable[[], dict]) -> dict:
        """The result of a recipe: from the file if it is there, else computed and written.

        Parameters
        ----------
        recipe : object
            All that the result depends on, as plain data.
        compute : callable
            Gives the result, as plain data.
        """
        key = content_hash([json.dumps(recipe, sort_keys=True)])
        if key not in self.found:
            self.found[key] = compute()
            if self.path is not None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("a", encoding="utf-8") as file:
                    # a line of its own, also after one that was cut off
                    file.write("\n" + json.dumps({"key": key, "found": self.found[key]}))
        return self.found[key]


def content_hash(texts: Sequence[str]) -> str:
    """SHA-256 of a sequence of texts."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()
