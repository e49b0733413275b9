"""The right answer to an exercise, what is off about a wrong one, and what `check` says of it.

A verdict names the mistake where it is known, otherwise how the answer differs, and never the right
answer.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Mapping, Sequence, Set, Sized
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import numpy as np

from ..checks import suggest
from ..models import PruningPlan

#: Kinds of answers, as the reader is told what is expected.
KINDS = {
    "number": "a number",
    "share": "a share between 0 and 1",
    "count": "a whole number",
    "set": "a set of whole numbers",
    "name": "a name, in quotes",
    "plan": "a pruning plan",
}


@dataclass(frozen=True)
class Verdict:
    """A line on an answer.

    Parameters
    ----------
    right : bool or None
        None as long as there is no answer.
    message : str
        One line.
    """

    right: bool | None
    message: str

    def __bool__(self) -> bool:
        return bool(self.right)

    def __str__(self) -> str:
        return f"{'·' if self.right is None else '✓' if self.right else '✗'} {self.message}"

    __repr__ = __str__  # a notebook cell shows the line itself


@dataclass(frozen=True)
class Answer:
    """The right answer, and the values that typical mistakes give instead.

    Parameters
    ----------
    value : number, set, str or callable
        The right answer; of a plan, of which many may be right, a function from the plan to what is
        off about it or None.
    mistakes : mapping
        Description of a mistake to the value it gives.
    options : sequence of str
        Names to choose from.
    tolerance : float
        Relative to the right number.
    """

    value: Any
    mistakes: Mapping[str, Any] = field(default_factory=dict)
    options: Sequence[str] = ()
    tolerance: float = 0.01

    def problem(self, kind: str, answer: Any) -> str | None:
        """Error of an answer of a kind (a key of `KINDS`) in words; None if it is right."""
        try:
            given = _read(kind, answer)
        except ValueError as error:
            return str(error)
        if kind == "plan":
            return self.value(given)
        if kind == "name" and given not in self.options:
            return f"{given!r} is not among the names; {suggest(given, list(self.options))}"
        if self._same(kind, given, self.value):
            return None
        for mistake, value in {**self.mistakes, **_general_mistakes(kind, self.value)}.items():
            if self._same(kind, given, value):
                return f"this is {mistake}"
        return _difference(kind, given, self.value)

    def _same(self, kind: str, given: Any, value: Any) -> bool:
        if kind in ("number", "share"):
            return math.isclose(given, value, rel_tol=self.tolerance, abs_tol=1e-9)
        return given == value


def _read(kind: str, answer: Any) -> Any:
    """The answer as a float, a set, a name or a plan; ValueError if it is of another kind."""
    if kind == "set":
        return _read_set(answer)
    given: Any
    if kind in ("name", "plan"):
        given = answer if isinstance(answer, str if kind == "name" else PruningPlan) else None
    else:
        given = _read_number(answer)
    if given is None or (kind == "count" and given % 1):
        raise ValueError(f"expected {KINDS[kind]}, got {_described(answer)}")
    if isinstance(given, float) and not math.isfinite(given):
        raise ValueError(f"it is {given}: was something divided by 0, or averaged over nothing?")
    return given


def _read_number(answer: Any) -> float | None:
    """A number, also as an array, Series or tensor of one element."""
    with contextlib.suppress(TypeError, ValueError, RuntimeError, ArithmeticError):
        value = answer.item() if hasattr(answer, "item") else answer
        return None if isinstance(value, bool | str | bytes) else float(value)
    return None


def _read_set(answer: Any) -> set[int]:
    """Whole numbers of any container."""
    entries = answer.tolist() if hasattr(answer, "tolist") else answer
    if not isinstance(entries, Set | list | tuple | range):
        raise ValueError(f"expected {KINDS['set']}, got {_described(answer)}")
    entries = [entry.item() if isinstance(entry, np.generic) else entry for entry in entries]
    if entries and all(isinstance(entry, bool) for entry in entries):
        raise ValueError("this is a mask of True and False; the places of True are asked for")
    for entry in entries:
        if isinstance(entry, bool) or not isinstance(entry, Real) or entry % 1:
            raise ValueError(f"expected {KINDS['set']}; one of yours is {entry!r:.40}")
    return {int(entry) for entry in entries}


def _general_mistakes(kind: str, value: Any) -> dict[str, Any]:
    """Mistakes that any exercise of a kind may meet."""
    if kind == "share":
        percentage, rest = "a percentage; divide by 100", "the rest, 1 minus what is asked for"
        return {percentage: 100 * value, rest: 1 - value}
    return {"the right size with the wrong sign": -value} if kind in ("number", "count") else {}


def _difference(kind: str, given: Any, value: Any) -> str:
    """Difference of an answer from the right one, in words that do not give it away."""
    if kind == "name":
        return f"it is not {given!r}"
    if kind == "set":
        missing, extra = value - given, given - value
        parts = []
        if missing:
            parts.append(f"{len(missing)} of {len(value)} missing, {min(missing)} is one")
        if extra:
            parts.append(f"{len(extra)} too many, {min(extra)} is one")
        return "; ".join(parts)
    if kind == "share" and not 0 <= given <= 1:
        return f"a share lies between 0 and 1, this is {given:.4g}"
    side = "large" if given > value else "small"
    if given * value <= 0:
        return f"too {side}"
    factor = max(given / value, value / given)
    return (
        f"close, but too {side}"
        if factor < 1.1
        else f"too {side}, by a factor of about {factor:.2g}"
    )


def _described(answer: Any) -> str:
    """An answer of the wrong kind, in a few words."""
    if isinstance(answer, str):
        return f"the text {answer!r:.40}"
    if isinstance(answer, Real | np.bool_) and answer < 1e15 and answer > -1e15:
        return f"{answer}"
    if inspect.isroutine(answer):
        return f"the function {answer.__name__}; call it, with ()"
    name = type(answer).__name__
    article = "an" if name[0] in "aeioAEIO" else "a"
    if isinstance(getattr(answer, "shape", None), tuple):
        return f"{article} {name} of shape {tuple(answer.shape)}"
    return f"{article} {name}" + (f" of {len(answer)}" if isinstance(answer, Sized) else "")
