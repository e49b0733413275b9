"""Frames made fit to draw: columns checked, names made literal."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ..checks import Frame, InvalidArgument, Text, first_line
from .style import STYLE

_SENTENCES = ("model", "protocol", "device")  # columns of sentences rather than names


def draws_frame(
    names: str = "", numbers: str = "", *, parts: str = "", empty: bool = False
) -> Callable:
    """Check a figure function's frame, its first argument, and draw it under the kit's style.

    Parameters
    ----------
    names, numbers : str
        Columns, separated by spaces: of texts, of numbers or truth values. Values that are not
        finite are not drawn.
    parts : str
        Those of the names that the function takes apart at ``", "``: each part is shortened by
        itself.
    empty : bool
        Whether the function draws a frame without rows.
    """
    check = Frame(names.split(), numbers.split())

    def decorate(function: Callable[..., Figure]) -> Callable[..., Figure]:
        signature = inspect.signature(function)
        first = next(iter(signature.parameters))

        @functools.wraps(function)
        def draw(*args, **options) -> Figure:
            arguments = signature.bind(*args, **options).arguments
            frame = check(first, arguments.pop(first))
            if frame.empty and not empty:
                raise InvalidArgument(f"{first} has no rows; expected at least one to draw")
            frame = frame.replace([np.inf, -np.inf], np.nan)
            for column in {*names.split(), "domain"} & {*frame}:
                values = _literal_column(first, frame[column], column in parts.split())
                frame = frame.assign(**{column: values})
            arguments = {key: _literal_argument(key, value) for key, value in arguments.items()}
            try:
                with mpl.rc_context(STYLE):
                    return function(frame, **arguments)
            except (LookupError, ValueError, TypeError, ArithmeticError) as error:
                raise ValueError(
                    f"{first} cannot be drawn by {function.__name__}: {first_line(error)}; compare "
                    "its rows with those that the function's description names"
                ) from error

        return draw

    return decorate


def _literal_column(first: str, values: pd.Series, in_parts: bool) -> pd.Series:
    """Texts as they are drawn; names that would look alike are refused."""
    if not values.map(lambda value: isinstance(value, str)).all():
        raise InvalidArgument(f"column {values.name!r} of {first} holds no texts; expected names")
    longest = 200 if values.name in _SENTENCES else 40
    if in_parts:
        parts = values.reset_index(drop=True).str.split(", ").explode()
        drawn = _literal_column(first, parts, False).groupby(level=0).agg(", ".join)
        drawn.index = values.index
    else:
        drawn = values.map(lambda value: literal(value, longest))
    if drawn.nunique() < values.nunique():
        twice = drawn.groupby(drawn).transform(lambda same: values[same.index].nunique() > 1)
        raise InvalidArgument(
            f"column {values.name!r} of {first} holds several names that look like "
            f"{drawn[twice].iloc[0]!r} when drawn; expected shorter or other names"
        )
    return drawn


def _literal_argument(key: str, value):
    if key in ("caption", "title"):
        return Text()(key, value).replace("$", r"\$")
    if isinstance(value, Mapping):
        return {literal(name): entry for name, entry in value.items()}
    return literal(value) if isinstance(value, str) else value


def literal(name: str, longest: int = 40) -> str:
    """A name as it is written: in one line and not too long, no formula, never left out."""
    words = " ".join("".join(c if c.isprintable() else " " for c in name).split())
    if len(words) > longest:
        words = f"{words[: longest - 21]}…{words[-20:]}"
    words = (words or "(no name)").replace("$", r"\$")
    return f" {words}" if words.startswith("_") else words  # legends leave out "_name"
