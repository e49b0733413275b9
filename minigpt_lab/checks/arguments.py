"""Checks declared beside a signature, applied when the function is called."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable

from transformers import PreTrainedModel

from .messages import InvalidArgument
from .model_locks import locked
from .values import Check


def checked(**checks: Check) -> Callable:
    """Check a function's arguments before it runs; lock the models among them for the call.

    Defaults are not checked.

    Parameters
    ----------
    **checks : Check
        By the name of the argument.

    Raises
    ------
    InvalidArgument
        For the first argument that its check refuses.
    """

    def decorate(function: Callable) -> Callable:
        signature = inspect.signature(function)
        unknown = checks.keys() - signature.parameters.keys()
        assert not unknown, f"{function.__name__} takes no {unknown}"

        @functools.wraps(function)
        def call(*args, **options):
            bound = signature.bind(*args, **options)
            models = []
            for name, check in checks.items():
                if name in bound.arguments:
                    value = bound.arguments[name] = check(name, bound.arguments[name])
                    models += [value] if check.locks and isinstance(value, PreTrainedModel) else []
            with locked(*models):
                return function(*bound.args, **bound.kwargs)

        return call

    return decorate


def refuse_unused(function: Callable, where: str, **given: object) -> None:
    """Refuse arguments that differ from their defaults where they have no effect.

    Parameters
    ----------
    function : callable
        Whose defaults count.
    where : str
        What leaves them without effect, e.g. ``"loss='label'"``.
    **given : object
        The arguments.

    Raises
    ------
    InvalidArgument
        For the first that is not its default.
    """
    defaults = inspect.signature(function).parameters
    for name, value in given.items():
        if value != defaults[name].default:
            raise InvalidArgument(
                f"{name} is {value!r}, but has no effect with {where}; leave it out"
            )


def check_fields(record: object, **checks: Check) -> None:
    """Check and convert a dataclass's fields, in its ``__post_init__``; also of a frozen one.

    Raises
    ------
    InvalidArgument
        For the first field that its check refuses.
    """
    for name, check in checks.items():
        object.__setattr__(record, name, check(name, getattr(record, name)))
