"""The registry of exercises, and `check`, which compares an answer with the right one."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass

from ..checks import InvalidArgument, first_line, suggest
from .functions import Unanswered
from .verdicts import KINDS, Answer, Verdict


@dataclass(frozen=True)
class Exercise:
    """An exercise: the kind of its answer, and the function that computes the right one."""

    kind: str
    compute: Callable[..., Answer]

    @property
    def parameters(self) -> list[str]:
        """Names of the objects that the right answer is computed from."""
        return list(inspect.signature(self.compute).parameters)


#: Exercises by name.
EXERCISES: dict[str, Exercise] = {}


def exercise(kind: str) -> Callable:
    """Register a function as an exercise under its name, with spaces (decorator).

    Parameters
    ----------
    kind : {"number", "share", "count", "set", "plan", "function"}
        Of the answer.
    """

    def register(function: Callable[..., Answer]) -> Callable[..., Answer]:
        EXERCISES[function.__name__.replace("_", " ")] = Exercise(kind, function)
        return function

    return register


def check(name: str, answer: object, /, **given: object) -> Verdict:
    """Compare an answer to an exercise of the notebooks with the right one.

    Parameters
    ----------
    name : str
        A key of `minigpt_lab.exercises.EXERCISES`.
    answer : object
        The reader's answer; None or ``...`` as long as there is none. A function runs on small
        inputs, for ten seconds at most in a notebook (not on Windows).
    **given
        Objects that the right answer is computed from, as the notebook passes them.

    Returns
    -------
    Verdict
        Right, not answered yet, what is off, or that the objects given do not hold the right answer
        (a component that was not swept, say): neither is ever an exception.

    Raises
    ------
    InvalidArgument
        If there is no such exercise, or other objects are given than the exercise is computed from.
    """
    name = str(name)
    if name not in EXERCISES:
        raise InvalidArgument(f"no exercise {name!r:.60}; {suggest(name, list(EXERCISES))}")
    kind, needed = EXERCISES[name].kind, EXERCISES[name].parameters
    if set(given) != set(needed):
        raise InvalidArgument(
            f"exercise {name!r} is computed from {', '.join(needed)}; got {', '.join(given)}"
        )
    unanswered = Verdict(None, f"{name}: not answered yet; expected is {KINDS[kind][0]}")
    if answer is None or answer is ...:
        return unanswered
    try:
        right = EXERCISES[name].compute(**given)
        if kind in ("number", "share", "count") and not math.isfinite(right.value):
            raise ArithmeticError(f"the right answer would be {right.value}")
        problem = right.problem(kind, answer)
    except Unanswered:
        return unanswered
    except (LookupError, ValueError, ArithmeticError, TypeError, AttributeError, RuntimeError) as e:
        reason = f"there is no {e}" if isinstance(e, KeyError) else first_line(e)
        return Verdict(None, f"{name}: cannot be computed from what was measured here: {reason}")
    return Verdict(problem is None, f"{name}: {problem or 'right'}")
