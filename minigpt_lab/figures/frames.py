"""From a frame of any origin to one that can be drawn: columns checked, names made literal."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ..checks import Instance, InvalidArgument, Text, first_line, suggest
from .style import STYLE

_LONGEST = 40  # characters of a name
_LONG = ("model", "protocol", "device")  # columns of sentences rather than names
_TITLES = ("caption", "title")


def drawn(
    names: str = "", numbers: str = "", maybe: str = "", flags: str = "", empty: bool = False
) -> Callable:
    """Check a figure function's frame, its first argument, and draw it under the kit's style.

    Parameters
    ----------
    names, numbers, maybe, flags : str
        Columns, separated by spaces: of texts, of numbers, of numbers that may all be missing, of
        truth values. What is not finite is not drawn.
    empty : bool
        Whether the function draws a frame without rows.
    """

    def decorate(function: Callable[..., Figure]) -> Callable[..., Figure]:
        signature = inspect.signature(function)
        first = next(iter(signature.parameters))

        @functools.wraps(function)
        def draw(*args, **options) -> Figure:
            given = signature.bind(*args, **options).arguments
            frame = Instance(pd.DataFrame)(first, given[first])
            _refuse_missing(first, frame, f"{names} {numbers} {maybe} {flags}".split())
            if frame.empty and not empty:
                raise InvalidArgument(f"{first} has no rows; expected at least one to draw")
            also = {name: None for name in ("domain",) if name in frame}  # of several plans
            frame = _numeric(first, frame, numbers.split(), maybe.split(), empty)
            given[first] = frame
            given = _literal(first, given, list({**dict.fromkeys(names.split()), **also}))
            try:
                with mpl.rc_context(STYLE):
                    return function(**given)
            except InvalidArgument:
                raise
            except (LookupError, ValueError, TypeError, ArithmeticError) as error:
                raise ValueError(
                    f"{first} cannot be drawn by {function.__name__}: {first_line(error)}; compare "
                    "its rows with those that the function's description names"
                ) from error

        return draw

    return decorate


def _refuse_missing(first: str, frame: pd.DataFrame, needed: list[str]) -> None:
    absent = [name for name in needed if name not in frame]
    if absent:
        known = [str(name) for name in frame.columns]
        hint = suggest(absent[0], known) if known else "it has none"
        raise InvalidArgument(f"{first} has no column {', '.join(map(repr, absent))}; {hint}")


def _numeric(
    first: str, frame: pd.DataFrame, numbers: list[str], maybe: list[str], empty: bool
) -> pd.DataFrame:
    """The frame with numbers of Python's float where they are not finite; else as they are."""
    changed = {}
    for name in (*numbers, *maybe):
        try:
            values = pd.to_numeric(frame[name])
        except (ValueError, TypeError) as error:
            reason = first_line(error)
            raise InvalidArgument(
                f"column {name!r} of {first} holds no numbers: {reason}"
            ) from None
        finite = np.isfinite(values.astype(float))
        if name in numbers and not finite.any() and not empty:
            raise InvalidArgument(f"column {name!r} of {first} holds no finite number to draw")
        if "perplexity" in name and (values <= 0).any():
            low = values.min()
            raise InvalidArgument(f"column {name!r} of {first} holds {low}; expected above 0")
        if not finite.all() or values.dtype != frame[name].dtype:
            changed[name] = values.where(finite)
    return frame.assign(**changed) if changed else frame


def _literal(first: str, given: Mapping[str, object], names: list[str]) -> dict[str, object]:
    """Arguments whose names are drawn as they are written, in one line and not too long."""
    frame = given[first]
    for name in names:
        odd = frame[name].map(lambda value: not isinstance(value, str))
        if odd.any():
            value = frame.loc[odd, name].iloc[0]
            raise InvalidArgument(f"column {name!r} of {first} holds {value!r:.40}; expected texts")
    found = {name: dict.fromkeys(frame[name].unique()) for name in names}
    rest = [value for key, value in given.items() if key not in (first, *_TITLES)]
    keys = [key for value in rest if isinstance(value, Mapping) for key in value]
    texts = [value for value in rest if isinstance(value, str)]
    short = _shown([*keys, *texts, *(v for n in names if n not in _LONG for v in found[n])])
    long = _shown([value for name in names if name in _LONG for value in found[name]], 200)
    new = {n: frame[n].map(long if n in _LONG else short) for n in names}
    arguments = {first: frame.assign(**new)}
    for key, value in given.items():
        if key in _TITLES:
            arguments[key] = Text()(key, value).replace("$", r"\$")
        elif isinstance(value, str):
            arguments[key] = short[value]
        elif isinstance(value, Mapping):
            arguments[key] = {short[each]: entry for each, entry in value.items()}
        elif key != first:
            arguments[key] = value
    return arguments


def _shown(names: list[str], longest: int = _LONGEST) -> dict[str, str]:
    """What is drawn for each name; different names stay different."""
    shown: dict[str, str] = {}
    for name in dict.fromkeys(names):
        words = " ".join("".join(c if c.isprintable() else " " for c in str(name)).split())
        if len(words) > longest:
            words = f"{words[: longest - 21]}…{words[-20:]}"
        words = words or "(no name)"
        words = f" {words}" if words.startswith("_") else words  # else no legend lists it
        words = words.replace("$", r"\$")  # no formula
        taken = set(shown.values())
        numbered = (f"{words} ({n})" for n in range(2, len(names) + 2))
        shown[name] = words if words not in taken else next(w for w in numbered if w not in taken)
    return shown
