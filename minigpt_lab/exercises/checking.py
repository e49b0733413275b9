"""The registry of exercises, and `check`, which compares an answer with the right one."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import get_type_hints

from ..assets import nearest
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
        Right, not answered yet, or what is off: a wrong answer is never an exception.

    Raises
    ------
    ValueError
        If there is no such exercise.
    TypeError
        If other objects are given than the exercise is computed from.
    """
    if name not in EXERCISES:
        raise ValueError(f"no exercise {name!r}; {nearest(name, list(EXERCISES))}")
    asked = EXERCISES[name]
    needed = list(inspect.signature(asked).parameters)
    if set(given) != set(needed):
        raise TypeError(
            f"exercise {name!r} is computed from {', '.join(needed)}; got {', '.join(given)}"
        )
    if answer is None or answer is ...:
        kind = get_type_hints(asked)["return"].kind
        return Verdict(None, f"{name}: not answered yet; expected is {kind}")
    problem = asked(**given).problem(answer)
    return Verdict(problem is None, f"{name}: {'right' if problem is None else problem}")
