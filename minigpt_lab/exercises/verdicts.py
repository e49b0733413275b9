"""The right answer to an exercise, what is off about a wrong one, and what `check` says of it.

A verdict names the mistake where it is known, otherwise how the answer differs, and never the right
answer.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..checks import Function, Instance, Integer, InvalidArgument, ListOf, Number
from ..models import PruningPlan
from .functions import function_problem


class _ReadersFunction(Function):
    """A function, not what a call of it returns."""

    remedy = "pass the function itself, without calling it"


#: Kinds of answers: as the reader is told what is expected, and what is allowed.
KINDS: dict[str, tuple[str, Any]] = {
    "number": ("a number", Number()),
    "share": ("a share between 0 and 1", Number()),  # others are told apart as mistakes
    "count": ("a whole number", Integer()),
    "set": ("a set of whole numbers", ListOf(Integer(), kind=set)),
    "plan": ("a pruning plan", Instance(PruningPlan)),
    "function": ("a function", _ReadersFunction()),
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

    def __repr__(self) -> str:  # a notebook cell shows the line itself
        return f"{'·' if self.right is None else '✓' if self.right else '✗'} {self.message}"


@dataclass(frozen=True)
class Answer:
    """The right answer, and the values that typical mistakes give instead.

    Parameters
    ----------
    value : number, set or callable
        The right answer, be it a function; of a plan, of which many may be right, a function from
        the plan to what is off about it or None.
    mistakes : mapping
        Description of a mistake to the value it gives, or the function that makes it.
    tolerance : float
        Relative to the right numbers.
    cases : mapping
        Of a function: description of small inputs to these, in the order of its parameters.
    """

    value: Any
    mistakes: Mapping[str, Any] = field(default_factory=dict)
    tolerance: float = 0.01
    cases: Mapping[str, Sequence] = field(default_factory=dict)

    def problem(self, kind: str, answer: Any) -> str | None:
        """Error of an answer of a kind (a key of `KINDS`) in words; None if it is right."""
        if kind in ("number", "share", "count"):  # also as an array, Series or tensor of one
            with contextlib.suppress(AttributeError, TypeError, ValueError, RuntimeError):
                answer = answer.item()
        try:
            given = KINDS[kind][1]("answer", answer)
        except InvalidArgument as error:
            return str(error)
        if kind == "plan":
            return self.value(given)
        if kind == "function":
            return function_problem(given, self.value, self.mistakes, self.cases, self.tolerance)
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


def _general_mistakes(kind: str, value: Any) -> dict[str, Any]:
    """Mistakes that any exercise of a kind may meet."""
    if kind == "share":
        percentage, rest = "a percentage; divide by 100", "the rest, 1 minus what is asked for"
        return {percentage: 100 * value, rest: 1 - value}
    return {"the right size with the wrong sign": -value} if kind in ("number", "count") else {}


def _difference(kind: str, given: Any, value: Any) -> str:
    """Difference of an answer from the right one, in words that do not give it away."""
    if kind == "set":
        counts = {f"of {len(value)} missing": value - given, "too many": given - value}
        return "; ".join(f"{len(s)} {what}, {min(s)} is one" for what, s in counts.items() if s)
    if kind == "share" and not 0 <= given <= 1:
        return f"a share lies between 0 and 1, this is {given:.4g}"
    side = "large" if given > value else "small"
    if given * value <= 0:
        return f"too {side}"
    factor = max(given / value, value / given)
    if factor < 1.1:
        return f"close, but too {side}"
    return f"too {side}, by a factor of about {factor:.2g}"
