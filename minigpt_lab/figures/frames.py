"""Frames made fit to draw: columns checked, names made literal."""

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


def draws_frame(
    names: str = "", numbers: str = "", *, maybe: str = "", flags: str = "", empty: bool = False
) -> Callable:
    """Check a figure function's frame, its first argument, and draw it under the kit's style.

    Parameters
    ----------
    names, numbers, maybe, flags : str
        Columns, separated by spaces: of texts, of numbers, of numbers that may all be missing, of
        truth values. Values that are not finite are not drawn.
    empty : bool
        Whether the function draws a frame without rows.
    """
    texts, needed, optional = names.split(), numbers.split(), maybe.split()

    def decorate(function: Callable[..., Figure]) -> Callable[..., Figure]:
        signature = inspect.signature(function)
        first = next(iter(signature.parameters))

        @functools.wraps(function)
        def draw(*args, **options) -> Figure:
            arguments = signature.bind(*args, **options).arguments
            frame = Instance(pd.DataFrame)(first, arguments.pop(first))
            _require_columns(first, frame, [*texts, *needed, *optional, *flags.split()])
            if frame.empty and not empty:
                raise InvalidArgument(f"{first} has no rows; expected at least one to draw")
            for column in (*needed, *optional):
                values = _finite(first, frame[column], required=column in needed and not empty)
                frame = frame.assign(**{column: values})
            domain = ["domain"] if "domain" in frame and "domain" not in texts else []
            frame, arguments = _literal(first, frame, arguments, columns=[*texts, *domain])
            try:
                with mpl.rc_context(STYLE):
                    return function(frame, **arguments)
            except InvalidArgument:
                raise
            except (LookupError, ValueError, TypeError, ArithmeticError) as error:
                raise ValueError(
                    f"{first} cannot be drawn by {function.__name__}: {first_line(error)}; compare "
                    "its rows with those that the function's description names"
                ) from error

        return draw

    return decorate


def _require_columns(first: str, frame: pd.DataFrame, needed: list[str]) -> None:
    absent = [name for name in needed if name not in frame]
    if absent:
        known = [str(name) for name in frame.columns]
        hint = suggest(absent[0], known) if known else "it has none"
        raise InvalidArgument(f"{first} has no column {', '.join(map(repr, absent))}; {hint}")


def _finite(first: str, values: pd.Series, *, required: bool) -> pd.Series:
    """A column as numbers, NaN where they are not finite."""
    column = f"column {values.name!r} of {first}"
    try:
        values = pd.to_numeric(values)
    except (ValueError, TypeError) as error:
        raise InvalidArgument(f"{column} holds no numbers: {first_line(error)}") from None
    finite = np.isfinite(values.astype(float))
    if required and not finite.any():
        raise InvalidArgument(f"{column} holds no finite number to draw")
    if "perplexity" in str(values.name) and (values <= 0).any():
        raise InvalidArgument(f"{column} holds {values.min()}; expected above 0")
    return values if finite.all() else values.where(finite)


def _literal(
    first: str, frame: pd.DataFrame, arguments: dict[str, object], *, columns: list[str]
) -> tuple[pd.DataFrame, dict[str, object]]:
    """Frame and arguments whose names are drawn as they are written, in one line and not too long.

    A name gets one form in all columns, dictionaries and single arguments.
    """
    for column in columns:
        odd = frame.loc[frame[column].map(lambda value: not isinstance(value, str)), column]
        if len(odd):
            value = f"{odd.iloc[0]!r:.40}"
            raise InvalidArgument(f"column {column!r} of {first} holds {value}; expected texts")
    names = [name for column in columns if column not in _LONG for name in frame[column].unique()]
    for key, value in arguments.items():
        if isinstance(value, Mapping):
            names += value
        elif isinstance(value, str) and key not in _TITLES:
            names.append(value)
    sentences = [each for column in columns if column in _LONG for each in frame[column].unique()]
    short, long = _shown(names), _shown(sentences, 200)
    frame = frame.assign(**{c: frame[c].map(long if c in _LONG else short) for c in columns})
    for key, value in arguments.items():
        if key in _TITLES:
            arguments[key] = Text()(key, value).replace("$", r"\$")
        elif isinstance(value, Mapping):
            arguments[key] = {short[name]: entry for name, entry in value.items()}
        elif isinstance(value, str):
            arguments[key] = short[value]
    return frame, arguments


def _shown(names: list[str], longest: int = _LONGEST) -> dict[str, str]:
    """Name to the text that is drawn for it; different names get different texts."""
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
