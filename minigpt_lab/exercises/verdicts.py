"""What an answer to an exercise can be, and what is off about a wrong one.

Every kind of answer holds the right one and what typical mistakes give instead. A verdict names the
mistake where it is known, otherwise how the answer differs, and never the right answer.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence, Set, Sized
from dataclasses import dataclass, field
from numbers import Real
from typing import ClassVar

import numpy as np

from ..checks import suggest
from ..models import PruningPlan


@dataclass(frozen=True)
class Verdict:
    """What `check` says of an answer.

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
class Number:
    """A number, right within a relative tolerance.

    Parameters
    ----------
    value : float
        The right answer.
    mistakes : mapping
        What a wrong answer is instead, in words, to its value.
    tolerance : float
        Relative to the right answer.
    """

    kind: ClassVar[str] = "a number"
    value: float
    mistakes: Mapping[str, float] = field(default_factory=dict)
    tolerance: float = 0.01

    def problem(self, answer: object) -> str | None:
        """What is off, or None."""
        found = self._read(answer)
        if found is None:
            return _other_kind(self.kind, answer)
        if not math.isfinite(found):
            return f"it is {found}: was something divided by 0, or averaged over nothing?"
        if self._near(found, self.value):
            return None
        for what, value in self._known().items():
            if self._near(found, value):
                return f"this is {what}"
        return self._distance(found)

    def _read(self, answer: object) -> float | None:
        # arrays, Series and tensors of one element count, NumPy's scalars too
        with contextlib.suppress(TypeError, ValueError, RuntimeError, ArithmeticError):
            value = answer.item() if hasattr(answer, "item") else answer
            return None if isinstance(value, bool | str | bytes) else float(value)
        return None

    def _near(self, found: float, value: float) -> bool:
        return math.isclose(found, value, rel_tol=self.tolerance, abs_tol=1e-9)

    def _known(self) -> dict[str, float]:
        return {**self.mistakes, "the right size with the wrong sign": -self.value}

    def _distance(self, found: float) -> str:
        side = "large" if found > self.value else "small"
        if found * self.value <= 0:
            return f"too {side}"
        ratio = max(found / self.value, self.value / found)
        if ratio < 1.1:
            return f"close, but too {side}"
        return f"too {side}, by a factor of about {ratio:.2g}"


class Share(Number):
    """A number between 0 and 1."""

    kind = "a share between 0 and 1"

    def _known(self) -> dict[str, float]:
        general = {
            "a percentage; divide by 100": 100 * self.value,
            "the rest, 1 minus what is asked for": 1 - self.value,
        }
        return {**self.mistakes, **general}

    def _distance(self, found: float) -> str:
        if not 0 <= found <= 1:
            return f"a share lies between 0 and 1, this is {found:.4g}"
        return super()._distance(found)


class Count(Number):
    """A whole number, right if it is exactly the one."""

    kind = "a whole number"

    def _read(self, answer: object) -> float | None:
        value = super()._read(answer)
        return value if value is None or not value % 1 else None

    def _near(self, found: float, value: float) -> bool:
        return found == value


@dataclass(frozen=True)
class Members:
    """A set of whole numbers, in any container and order.

    Parameters
    ----------
    value : set
        The right answer.
    mistakes : mapping
        What a wrong answer is instead, in words, to its members.
    """

    kind: ClassVar[str] = "a set of whole numbers"
    value: Set[int]
    mistakes: Mapping[str, Set[int]] = field(default_factory=dict)

    def problem(self, answer: object) -> str | None:
        """What is off, or None."""
        entries = answer.tolist() if hasattr(answer, "tolist") else answer
        if not isinstance(entries, Set | list | tuple | range):
            return _other_kind(self.kind, answer)
        entries = [entry.item() if isinstance(entry, np.generic) else entry for entry in entries]
        if entries and all(isinstance(entry, bool) for entry in entries):
            return "this is a mask of True and False; the places of True are asked for"
        for entry in entries:
            if isinstance(entry, bool) or not isinstance(entry, Real) or entry % 1:
                return f"expected {self.kind}; one of yours is {entry!r:.40}"
        found = {int(entry) for entry in entries}
        if found == self.value:
            return None
        for what, value in self.mistakes.items():
            if found == value:
                return f"this is {what}"
        missing, extra = self.value - found, found - self.value
        parts = []
        if missing:
            parts.append(f"{len(missing)} of {len(self.value)} missing, {min(missing)} is one")
        if extra:
            parts.append(f"{len(extra)} too many, {min(extra)} is one")
        return "; ".join(parts)


@dataclass(frozen=True)
class Name:
    """One of several names.

    Parameters
    ----------
    value : str
        The right answer.
    options : sequence of str
        What can be answered.
    mistakes : mapping
        What a wrong answer is instead, in words, to its name.
    """

    kind: ClassVar[str] = "a name, in quotes"
    value: str
    options: Sequence[str]
    mistakes: Mapping[str, str] = field(default_factory=dict)

    def problem(self, answer: object) -> str | None:
        """What is off, or None."""
        if not isinstance(answer, str):
            return _other_kind(self.kind, answer)
        if answer not in self.options:
            return f"{answer!r} is not among the names; {suggest(answer, list(self.options))}"
        if answer == self.value:
            return None
        for what, value in self.mistakes.items():
            if answer == value:
                return f"this is {what}"
        return f"it is not {answer!r}"


@dataclass(frozen=True)
class Plan:
    """A pruning plan.

    Parameters
    ----------
    judge : callable
        What is off about a plan, or None: many plans may be right.
    """

    kind: ClassVar[str] = "a pruning plan"
    judge: Callable[[PruningPlan], str | None]

    def problem(self, answer: object) -> str | None:
        """What is off, or None."""
        if not isinstance(answer, PruningPlan):
            return _other_kind(self.kind, answer)
        return self.judge(answer)


def _other_kind(kind: str, answer: object) -> str:
    return f"expected {kind}, got {_described(answer)}"


def _described(answer: object) -> str:
    """An answer of the wrong kind, in a few words."""
    if isinstance(answer, str):
        return f"the text {answer!r:.40}"
    if isinstance(answer, Real | np.bool_) and abs(answer) < 1e15:
        return f"{answer}"
    if inspect.isroutine(answer):
        return f"the function {answer.__name__}; call it, with ()"
    name = type(answer).__name__
    article = "an" if name[0] in "aeioAEIO" else "a"
    if isinstance(getattr(answer, "shape", None), tuple):
        return f"{article} {name} of shape {tuple(answer.shape)}"
    return f"{article} {name}" + (f" of {len(answer)}" if isinstance(answer, Sized) else "")
