"""Checks of plain values: numbers, flags, choices, paths, lists."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real

import numpy as np
import pandas as pd
import torch

from .paths import UnusablePath, to_path
from .python_values import to_python, well_formed
from .words import suggest


class InvalidArgument(ValueError, TypeError):
    """An argument of the wrong type or out of range."""


def invalid(name: str, value: object, expected: str, remedy: str = "") -> InvalidArgument:
    """The error of an argument: its name and value, what is expected, what to do."""
    return InvalidArgument(
        f"{name} is {_shown(value)}; expected {expected}{remedy and '; '}{remedy}"
    )


def _shown(value: object) -> str:
    """A value in at most 60 characters; arrays, models and the like by their kind."""
    if isinstance(value, torch.Tensor | np.ndarray) and value.ndim:
        return f"a {type(value).__name__} of shape {[*value.shape]}"
    if isinstance(value, torch.nn.Module) or not _is_plain(value):
        return f"a {type(value).__name__}"
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def _is_plain(value: object) -> bool:
    kinds = (str, bytes, Real, Sequence, Mapping, set, os.PathLike, torch.Tensor, torch.dtype)
    return value is None or isinstance(value, (*kinds, np.ndarray, np.generic, torch.device, type))


class Check:
    """What an argument may be.

    Parameters
    ----------
    expected : str
        In words, for the error.
    remedy : str
        What to do instead, if that is not clear from `expected`.
    """

    expected = "something else"
    remedy = ""

    def __call__(self, name: str, value: object) -> object:
        """The value as the function takes it.

        Raises
        ------
        InvalidArgument
            If it is not allowed.
        """
        taken = self.take(value)
        if taken is REFUSED:
            raise invalid(name, value, self.expected, self.remedy)
        return taken

    def take(self, value: object) -> object:
        """The value in the form that the function works with, or `REFUSED`."""
        raise NotImplementedError

    def __or__(self, other: Check | None) -> Check:
        return AnyOf(self, Nothing() if other is None else other)


class _Refused:
    """The answer of a check that refuses; no value of a user."""


REFUSED = _Refused()


class AnyOf(Check):
    """One of several checks; the first that takes the value."""

    def __init__(self, *checks: Check):
        self.checks = checks
        self.expected = " or ".join(check.expected for check in checks)
        self.remedy = next((check.remedy for check in checks if check.remedy), "")

    def __call__(self, name, value):
        """As the first check that takes it says; a check with words of its own says them."""
        refusals = []
        for check in self.checks:
            try:
                return check(name, value)
            except InvalidArgument as error:
                refusals.append((check, error))
        rest = [(c, error) for c, error in refusals if not isinstance(c, Nothing)]
        if len(rest) == 1 and type(rest[0][0]).__call__ is not Check.__call__:
            raise rest[0][1]
        raise invalid(name, value, self.expected, self.remedy)

    def take(self, value):
        """Ask one after the other."""
        return next(
            (t for t in (check.take(value) for check in self.checks) if t is not REFUSED), REFUSED
        )


class Nothing(Check):
    """None."""

    expected = "None"

    def take(self, value):
        """Only None."""
        return None if value is None else REFUSED


class Number(Check):
    """A real number in a range; finite, unless `low` or `high` is infinite itself.

    Parameters
    ----------
    low, high : float, optional
        Least and greatest value.
    above, below : float, optional
        The same, excluded.
    """

    kind = "number"

    def __init__(self, low=None, high=None, above=None, below=None):
        self.low, self.high, self.above, self.below = low, high, above, below
        bounds = [
            (f"above {above}", above), (f"of at least {low}", low),
            (f"below {below}", below), (f"of at most {high}", high),
        ]  # fmt: skip
        limits = " and ".join(words for words, bound in bounds if bound is not None)
        self.expected = f"a {self.kind} {limits}".strip()

    def take(self, value):
        """A Python number in range."""
        value = self.number(to_python(value))
        if (
            value is REFUSED
            or math.isnan(value)
            or (math.isinf(value) and value not in (self.low, self.high))
        ):
            return REFUSED
        inside = (
            (self.low is None or value >= self.low)
            and (self.high is None or value <= self.high)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )
        return value if inside else REFUSED

    def number(self, value):
        """A real number that is no truth value, as Python's int or float."""
        if not isinstance(value, Real) or isinstance(value, bool):
            return REFUSED
        try:
            as_float = float(value)
        except OverflowError:
            return REFUSED
        return int(value) if isinstance(value, Integral) else as_float


class Integer(Number):
    """A whole number in a range; ``1e4`` is one."""

    kind = "whole number"

    def __init__(self, low=None, high=None):
        super().__init__(low, high)

    def number(self, value):
        """An integer, or a float that is one."""
        value = super().number(value)
        if value is REFUSED or isinstance(value, Integral):
            return value
        return int(value) if value.is_integer() else REFUSED


class Flag(Check):
    """True or False."""

    expected = "True or False"

    def take(self, value):
        """A truth value, also NumPy's."""
        value = to_python(value)
        return value if isinstance(value, bool) else REFUSED


class OneOf(Check):
    """One of a few strings.

    Parameters
    ----------
    choices : iterable of str
        Read anew at every call: a registry may grow.
    """

    def __init__(self, choices: Iterable[str]):
        self.choices = choices

    @property
    def expected(self) -> str:
        """The choices."""
        return f"one of {', '.join(map(repr, self.choices))}"

    def __call__(self, name, value):
        """Also offer what was probably meant."""
        if self.take(value) is REFUSED and isinstance(value, str):
            close = suggest(value, [*self.choices])
            remedy = close if close.startswith("did") else ""
            raise invalid(name, value, self.expected, remedy)
        return super().__call__(name, value)

    def take(self, value):
        """The string itself."""
        return value if isinstance(value, str) and value in self.choices else REFUSED


class Text(Check):
    """A string."""

    expected = "a string"

    def take(self, value):
        """Any string, also NumPy's, as `well_formed` has it."""
        return well_formed(str(value)) if isinstance(value, str) else REFUSED


class Location(Check):
    """A path; a leading ``~`` is the home folder, as in a shell."""

    expected = "a path (str or os.PathLike)"

    def take(self, value):
        """A string that is not empty, or a path."""
        if not isinstance(value, str | os.PathLike) or not value:
            return REFUSED
        try:
            found = to_path(value)
        except UnusablePath:
            return REFUSED
        # text stays as it is written: "tiny-opt" may be a name, and a slash at its end says folder
        return os.path.expanduser(value) if isinstance(value, str) else found  # noqa: PTH111


class ListOf(Check):
    """A sequence whose items another check takes; the function gets a tuple.

    Parameters
    ----------
    item : Check
        For every item.
    least : int
        Items needed.
    """

    def __init__(self, item: Check, least: int = 0):
        self.item, self.least = item, least
        self.expected = f"a list, each item {item.expected}"
        if least:
            self.expected += f", with at least {least}"

    def take(self, value):
        """A tuple of what the items are taken as."""
        odd = str | bytes | Mapping | pd.DataFrame  # a frame's items are its columns' names
        if isinstance(value, odd) or not isinstance(value, Iterable):
            return REFUSED
        if isinstance(value, torch.Tensor | np.ndarray):
            value = value.tolist() if value.ndim == 1 else [REFUSED]
        items = tuple(self.item.take(item) for item in value)
        return (
            REFUSED if len(items) < self.least or any(item is REFUSED for item in items) else items
        )


class Items(ListOf):
    """As `ListOf`, for data that goes to JSON: the function gets a list."""

    def take(self, value):
        """A list; long ones of whole numbers are checked by their extremes."""
        if isinstance(self.item, Integer) and isinstance(value, list) and value:
            ends = (min(value), max(value)) if {*map(type, value)} == {int} else (REFUSED,)
            if all(self.item.take(end) is not REFUSED for end in ends):
                return value
        taken = super().take(value)
        return taken if taken is REFUSED else list(taken)


class DictOf(Check):
    """A mapping whose keys and values other checks take; the function gets a dictionary.

    Parameters
    ----------
    key : Check
        For every key.
    value : Check, optional
        For every value; anything by default.
    least : int
        Entries needed.
    """

    def __init__(self, key: Check, value: Check | None = None, least: int = 0):
        self.key, self.value, self.least = key, value, least
        self.expected = f"a dictionary, each key {key.expected}"
        if value is not None:
            self.expected += f", each value {value.expected}"
        if least:
            self.expected += f", with at least {least}"

    def take(self, value):
        """A dictionary of what keys and values are taken as."""
        if not isinstance(value, Mapping) or len(value) < self.least:
            return REFUSED
        keys = [self.key.take(key) for key in value]
        take = self.value.take if self.value else to_python
        values = [take(each) for each in value.values()]
        return (
            REFUSED
            if any(each is REFUSED for each in (*keys, *values))
            else dict(zip(keys, values, strict=True))
        )


class Array(Check):
    """Numbers in one dimension."""

    expected = "an array of numbers in one dimension"

    def take(self, value):
        """An array of NumPy's."""
        try:
            found = np.asarray(value)
        except (ValueError, TypeError, RuntimeError):
            return REFUSED
        return found if found.ndim == 1 and found.dtype.kind in "iuf" else REFUSED


class Function(Check):
    """Something to be called."""

    expected = "a function"

    def take(self, value):
        """Any callable but a module."""
        return value if callable(value) and not isinstance(value, torch.nn.Module) else REFUSED


class Instance(Check):
    """An object of a class.

    Parameters
    ----------
    kind : type
        The class.
    remedy : str
        Where to get one.
    """

    def __init__(self, kind: type, remedy: str = ""):
        self.kind, self.remedy = kind, remedy
        article = "an" if kind.__name__[0] in "AEIOU" else "a"
        self.expected = f"{article} {kind.__name__}"

    def take(self, value):
        """The object itself."""
        return value if isinstance(value, self.kind) else REFUSED
