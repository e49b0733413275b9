"""The registry of exercises, and `check`, which compares an answer with the right one."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import get_type_hints

from ..checks import InvalidArgument, first_line, suggest
from .verdicts import Members, Name, Number, Plan, Verdict

#: Exercises by name: from what a notebook holds to an answer's kind, the right one and those that
#: typical mistakes give.
EXERCISES: dict[str, Callable[..., Number | Members | Name | Plan]] = {}


def exercise(function: Callable) -> Callable:
    """Register a function as an exercise under its name, with spaces (decorator)."""
    EXERCISES[function.__name__.replace("_", " ")] = function
    return function


def check(name: str, answer: object, /, **given: object) -> Verdict:
    """Compare an answer to an exercise of the notebooks with the right one.

    Parameters
    ----------
    name : str
        A key of `minigpt_lab.exercises.EXERCISES`.
    answer : object
        What the exercise asks for; None or ``...`` as long as there is no answer.
    **given
        What the right answer is computed from, as the notebook passes it.

    Returns
    -------
    Verdict
        Right, not answered yet, what is off, or that what is given does not hold the right answer
        (a component that was not swept, say): neither is ever an exception.

    Raises
    ------
    InvalidArgument
        If there is no such exercise, or other objects are given than the exercise is computed from.
    """
    if not isinstance(name, str) or name not in EXERCISES:
        hint = suggest(str(name), list(EXERCISES))
        raise InvalidArgument(f"no exercise {name!r:.60}; {hint}")
    asked = EXERCISES[name]
    needed = list(inspect.signature(asked).parameters)
    if set(given) != set(needed):
        found = ", ".join(given) or "none of them"
        raise InvalidArgument(
            f"exercise {name!r} is computed from {', '.join(needed)}; got {found}"
        )
    if answer is None or answer is ...:
        kind = get_type_hints(asked)["return"].kind
        return Verdict(None, f"{name}: not answered yet; expected is {kind}")
    try:
        right = asked(**given)
        unknown = isinstance(right, Number) and not math.isfinite(right.value)
        problem = right.problem(answer)
    except (
        LookupError,
        ValueError,
        ArithmeticError,
        TypeError,
        AttributeError,
        RuntimeError,
    ) as error:
        absent = isinstance(error, KeyError)
        return _not_computed(name, f"there is no {error}" if absent else first_line(error))
    if unknown:
        return _not_computed(name, f"the right answer would be {right.value}")
    return Verdict(problem is None, f"{name}: {'right' if problem is None else problem}")


def _not_computed(name: str, reason: str) -> Verdict:
    return Verdict(None, f"{name}: cannot be computed from what was measured here: {reason}")
