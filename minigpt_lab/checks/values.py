"""Checks of plain values: numbers, flags, choices, strings, paths, lists, dictionaries."""

from __future__ import annotations

import contextlib
import math
import operator
import os
import sys
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from typing import Any

import numpy as np
import pandas as pd
import torch

from .messages import InvalidArgument, did_you_mean, invalid
from .paths import UnusablePath, to_path
from .python_values import to_python, well_formed


class Mismatch(Exception):
    """A value is not what its check expects; its message, if any, is what to do about this one."""


def require(allowed: bool, remedy: str = "") -> None:
    """Raise `Mismatch` unless the value is allowed."""
    if not allowed:
        raise Mismatch(remedy)


class Check:
    """Rule for one argument; ``a | b`` allows either, ``a | None`` also None.

    Attributes
    ----------
    expected : str
        What is allowed, in words, for the error.
    remedy : str
        What to do instead, where neither `expected` nor the `Mismatch` tells.
    locks : bool
        Whether a call locks the value (a model) for its thread.
    """

    expected = "something else"
    remedy = ""
    locks = False

    def __call__(self, name: str, value: object) -> Any:
        """Return the value in the form that the function works with.

        Raises
        ------
        InvalidArgument
            If it is not allowed.
        """
        try:
            return self._convert(name, value)
        except Mismatch as mismatch:
            raise invalid(name, value, self.expected, str(mismatch) or self.remedy) from None

    def _convert(self, name: str, value: object) -> Any:
        """Return the converted value.

        Raises
        ------
        Mismatch
            If it is not what is expected.
        InvalidArgument
            If an item in it is not.
        """
        raise NotImplementedError

    def __or__(self, other: Check | None) -> Check:
        return AnyOf(self, Nothing() if other is None else other)


class AnyOf(Check):
    """One of several checks; the first that allows the value converts it.

    None is tried first: the last check says what is wrong with a value that none of them allows.
    """

    def __init__(self, *checks: Check):
        self.checks = sorted(checks, key=lambda check: not isinstance(check, Nothing))
        self.expected = " or ".join(check.expected for check in checks)
        self.remedy = next((check.remedy for check in checks if check.remedy), "")
        self.locks = any(check.locks for check in checks)

    def _convert(self, name, value):
        *others, last = self.checks
        for check in others:
            with contextlib.suppress(Mismatch, InvalidArgument):
                return check._convert(name, value)
        return last._convert(name, value)


class Nothing(Check):
    """None."""

    expected = "None"

    def _convert(self, name, value):
        require(value is None)


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
        bounds = (
            ("above", above, operator.gt),
            ("of at least", low, operator.ge),
            ("below", below, operator.lt),
            ("of at most", high, operator.le),
        )
        self.bounds = [each for each in bounds if each[1] is not None]
        self.infinite = {low, high} & {-math.inf, math.inf}
        limits = " and ".join(f"{words} {bound}" for words, bound, _ in self.bounds)
        self.expected = f"a {self.kind} {limits}".strip()

    def _convert(self, name, value):
        value = to_python(value)
        require(isinstance(value, Real) and not isinstance(value, bool))
        require(abs(value) <= sys.float_info.max or value in self.infinite)  # and no NaN
        require(all(within(value, bound) for _, bound, within in self.bounds))
        return int(value) if isinstance(value, Integral) else float(value)


class Integer(Number):
    """A whole number in a range; ``1e4`` is one."""

    kind = "whole number"

    def __init__(self, low=None, high=None):
        super().__init__(low, high)

    def _convert(self, name, value):
        value = super()._convert(name, value)
        require(value == int(value))
        return int(value)


class Flag(Check):
    """True or False, also NumPy's."""

    expected = "True or False"

    def _convert(self, name, value):
        value = to_python(value)
        require(isinstance(value, bool))
        return value


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
    def expected(self) -> str:  # type: ignore[override]  # read anew
        """The choices."""
        return f"one of {', '.join(map(repr, self.choices))}"

    def _convert(self, name, value):
        require(isinstance(value, str))
        require(value in self.choices, did_you_mean(value, self.choices))
        return value


class Text(Check):
    """A string, also NumPy's; made valid Unicode."""

    expected = "a string"

    def _convert(self, name, value):
        require(isinstance(value, str))
        return well_formed(str(value))


class Location(Check):
    """A path; a leading ``~`` is the home folder, as in a shell."""

    expected = "a path (str or os.PathLike)"

    def _convert(self, name, value):
        require(isinstance(value, str | os.PathLike) and bool(value))
        try:
            path = to_path(value)
        except UnusablePath:
            raise Mismatch from None
        # text stays as it is written: "tiny-opt" may be a name, and a slash at its end says folder
        return os.path.expanduser(value) if isinstance(value, str) else path  # noqa: PTH111


class ListOf(Check):
    """A sequence whose items another check allows.

    Parameters
    ----------
    item : Check
        For every item.
    least : int
        Items needed.
    kind : type
        What the function gets: ``tuple``, or ``list`` for data that goes to JSON.
    """

    def __init__(self, item: Check, least: int = 0, kind: type = tuple):
        self.item, self.least, self.kind = item, least, kind
        self.expected = f"a list, each item {item.expected}"
        if least:
            self.expected += f", with at least {least}"

    def _convert(self, name, value):
        not_lists = str | bytes | Mapping | pd.DataFrame  # a frame's items are its columns' names
        require(isinstance(value, Iterable) and not isinstance(value, not_lists))
        if isinstance(value, torch.Tensor | np.ndarray):
            require(value.ndim == 1)
            value = value.tolist()
        value = list(value)
        require(len(value) >= self.least)
        if isinstance(self.item, Integer) and {*map(type, value)} == {int}:
            self.item(f"the least of {name}", min(value))  # long lists of indices: by their ends
            self.item(f"the greatest of {name}", max(value))
            return self.kind(value)
        return self.kind(self.item(f"{name}[{i}]", item) for i, item in enumerate(value))


class DictOf(Check):
    """A mapping whose keys and values other checks allow; the function gets a dictionary.

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

    def _convert(self, name, value):
        require(isinstance(value, Mapping) and len(value) >= self.least)
        return {
            self.key(f"a key of {name}", key): to_python(item)
            if self.value is None
            else self.value(f"{name}[{key!r:.60}]", item)
            for key, item in value.items()
        }


class Array(Check):
    """Numbers in one dimension, as a NumPy array."""

    expected = "an array of numbers in one dimension"

    def _convert(self, name, value):
        try:
            array = np.asarray(value)
        except (ValueError, TypeError, RuntimeError):
            raise Mismatch from None
        require(array.ndim == 1 and array.dtype.kind in "iuf")
        return array


class Function(Check):
    """A callable; no module of torch."""

    expected = "a function"

    def _convert(self, name, value):
        require(callable(value) and not isinstance(value, torch.nn.Module))
        return value


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
        self.expected = f"{'an' if kind.__name__[0] in 'AEIOU' else 'a'} {kind.__name__}"

    def _convert(self, name, value):
        require(isinstance(value, self.kind))
        return value
