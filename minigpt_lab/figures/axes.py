"""Shared pieces of pictures: ticks, lines with a range, dots with intervals, annotated cells."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter, NullLocator


def log_ticks(low: float, high: float) -> tuple[list[float], list[str]]:
    """Round numbers from `low` to `high`, few enough to be read, and their labels."""
    powers = np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 1)
    steps = (1,) if len(powers) > 5 else (1, 3) if high / low > 30 else (1, 2, 5)
    every = -(-len(powers) // 6)
    marks = [step * 10.0**power for power in powers[::-every] for step in steps]
    marks = [mark for mark in marks if low <= mark <= high]
    words = [f"$10^{{{np.log10(mark):.0f}}}$" if len(powers) > 5 else f"{mark:g}" for mark in marks]
    return marks, words


def log_labels(axis: Axis, values: Iterable[float], *, n: int = 6, words="{x:g}") -> None:
    """Readable numbers on a log axis, whether `values` span a tenth of a decade or ten."""
    values = np.asarray(list(values), dtype=float)
    values = values[np.isfinite(values) & (values > 0)]
    values = values if len(values) else np.ones(1)
    low, high = values.min(), values.max()
    if high > 10 * low:
        axis.set_ticks(*log_ticks(low / 1.2, high * 1.2))
    else:
        axis.set_major_locator(MaxNLocator(n))
        axis.set_major_formatter(words)
        axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def layer_ticks(axis: Axes, layers: int, room: int) -> None:
    """Whole layers along the horizontal axis, as many as there is `room` for."""
    step = next(step for step in (1, 2, 5, 10, 20, 50, layers) if layers <= room * step)
    axis.set_xticks(range(0, layers, step))
    axis.set_xlim(-0.6, layers - 0.4)


def percent(value: float, _place: int | None = None) -> str:
    """A share in three digits at most, as tick labels want it."""
    return f"{100 * value:.3g} %".replace("-", "−")


def short_number(value: float, form: str = ".3g") -> str:
    """Three digits, or all of a large number."""
    return f"{value:,.0f}" if value >= 100 else format(value, form)


def line_with_range(axis: Axes, groups, *, middle: str = "median", **style) -> pd.Series:
    """Line through the groups' median (or mean) in the band of their range.

    Parameters
    ----------
    axis : matplotlib.axes.Axes
        Drawn on.
    groups : pandas grouped series
        Values by their place on the horizontal axis; groups of one value give no band.
    middle : {"median", "mean"}
        The line.
    **style
        As for `Axes.plot`.

    Returns
    -------
    pandas.Series
        The line's values.
    """
    values = groups.agg(middle)
    axis.plot(values.index, values, **style)
    if groups.size().max() > 1:
        band = {"color": style["color"], "alpha": 0.2, "lw": 0}
        axis.fill_between(values.index, groups.min(), groups.max(), **band)
    return values


def spread(middle: pd.Series, low: pd.Series, high: pd.Series) -> np.ndarray:
    """Lengths below and above the middle ``[2, row]``, as `Axes.errorbar` wants them."""
    return np.maximum([middle - low, high - middle], 0)


def value_labels(axis: Axes, values: Iterable[float], words: Iterable[str]) -> None:
    """Write above the dot of each row what it says."""
    box = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # not in the line of the interval
    style = {"xytext": (0, 6), "textcoords": "offset points", "ha": "center", "fontsize": 7.5}
    for row, (value, word) in enumerate(zip(values, words, strict=True)):
        axis.annotate(word, (value, row), bbox=box, **style)


def row_labels(axis: Axes, names: list[str]) -> None:
    """Names of the rows of dots, from the top, with room for labels above the first."""
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.5, -0.8)


def luminance(tint) -> float:
    """Relative luminance of a colour, 0 (black) to 1 (white), as WCAG defines it."""
    parts = np.array(to_rgb(tint))
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return float(linear @ (0.2126, 0.7152, 0.0722))


def heat(axis: Axes, values: pd.DataFrame, words: pd.DataFrame, fontsize: float = 8, **how) -> None:
    """A heatmap of annotated cells whose words stand out from every colour."""
    sns.heatmap(values, annot=words, fmt="", ax=axis, annot_kws={"fontsize": fontsize}, **how)
    mesh = axis.collections[0]
    mesh.update_scalarmappable()
    faces = mesh.get_facecolors()[~np.isnan(values.to_numpy(dtype=float)).ravel()]
    for text, face in zip(axis.texts, faces, strict=True):
        text.set_color("black" if luminance(face[:3]) > 0.18 else "white")
    axis.set(xlabel="", ylabel="")
    axis.grid(False)


def side_legend(figure: Figure, axis: Axes | None = None, *, upwards: bool = False) -> None:
    """Legend beside all axes, of one of them or of all; `upwards` begins with the last entry."""
    if axis is None:
        figure.legend(loc="outside right upper")
        return
    step = -1 if upwards else 1
    handles, labels = (entries[::step] for entries in axis.get_legend_handles_labels())
    figure.legend(handles, labels, loc="outside right upper")
