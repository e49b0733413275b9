"""State of a run that a later call resumes: what it was begun with, and how far it came."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from .cache import read_cached, read_result, write_result


class RunState:
    """Facts and progress of a run, in a JSON file of its folder.

    A damaged file is set aside: the run begins anew.

    Parameters
    ----------
    path : pathlib.Path, optional
        Of the file; by default nothing is written.
    words : mapping, optional
        Fact to the words that say that it differs; by default ``another FACT (old, now new)``.

    Attributes
    ----------
    facts : dict
        All that this call's result depends on, as far as it is known.
    progress : dict or None
        Of the run in the file; None if there is none.

    Raises
    ------
    FileExistsError
        If the file is something else: it is left alone.
    """

    def __init__(self, path: Path | None, words: Mapping[str, str] | None = None):
        self.path, self.words = path, words or {}
        self.facts: dict[str, object] = {}
        state = (path and read_cached(path, read_result)) or {}
        self._begun_with, self.progress = state.get("facts"), state.get("progress")

    def forget(self) -> None:
        """Begin anew: files beside the state are damaged."""
        self._begun_with = self.progress = None

    def require(self, facts: Mapping[str, object]) -> None:
        """Refuse to resume a run with other facts; call it as soon as each is known.

        Parameters
        ----------
        facts : mapping
            What the result depends on, as plain data.

        Raises
        ------
        ValueError
            If they are not those that the run was begun with; what differs is named.
        """
        facts = json.loads(json.dumps(facts))  # tuples become lists, as they did on disk
        self.facts |= facts
        if self._begun_with is None or self.path is None:
            return
        old = self._begun_with
        differing = [
            self.words.get(name, f"another {name} ({old.get(name)}, now {value})")
            for name, value in facts.items()
            if old.get(name) != value
        ]
        if differing:
            raise ValueError(
                f"{self.path.parent} holds a run with {', '.join(differing)}; repeat that call to "
                "resume it (with a model loaded anew if it changed it), or choose another out_dir"
            )

    def write(self, **progress: object) -> None:
        """Replace the file by the facts so far and the progress."""
        if self.path is not None:
            write_result({"facts": self.facts, "progress": progress}, self.path)
