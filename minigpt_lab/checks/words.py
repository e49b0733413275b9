"""Phrases for messages: the nearest known name, the first line of an error."""

from __future__ import annotations

from difflib import get_close_matches


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def suggest(name: str, known: list[str]) -> str:
    """``"did you mean …?"`` with the closest known names, or the list of all of them."""
    close = get_close_matches(name, known, n=3, cutoff=0.5)
    return (
        f"did you mean {' or '.join(map(repr, close))}?" if close else f"known: {', '.join(known)}"
    )
