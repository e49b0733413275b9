"""Shared pieces of pictures: panels, lines per group, ticks, dots with intervals, cells."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, MaxNLocator, NullFormatter, NullLocator

from .style import new_figure

_SEED = "one seed"
Looks = Mapping[str, Mapping]  # group to its colour and marker
Panel = tuple[Axes, str, pd.DataFrame]


def panel_row(
    table: pd.DataFrame,
    column: str,
    caption: str,
    title: str,
    *,
    size: tuple[float, float],
    beside: float = 2.2,
    **shape,
) -> tuple[Figure, list[Panel]]:
    """A figure of one panel per value of a column, and each panel's axis, value and rows.

    Parameters
    ----------
    table : pandas.DataFrame
        What is drawn.
    column : str
        Its values are the titles of the panels.
    caption, title : str
        See `new_figure`.
    size : tuple of float
        Width and height of a panel in inches.
    beside : float
        Inches for labels and legend.
    **shape
        As for `Figure.subplots`.
    """
    names = list(table[column].unique())
    figure = new_figure(size[0] * len(names) + beside, size[1], caption, title)
    axes = figure.subplots(1, len(names), squeeze=False, **shape).ravel()
    for axis, name in zip(axes, names, strict=True):
        axis.set_title(name)
    parts = (table[table[column] == name] for name in names)
    return figure, list(zip(axes, names, parts, strict=True))


def group_lines(
    axis: Axes, rows: pd.DataFrame, x: str, y: str, looks: Looks, *, by: str, at: str = "", **style
) -> dict[str, pd.DataFrame]:
    """A line per group through the mean of its rows at each place; several rows are dots too.

    Parameters
    ----------
    axis : matplotlib.axes.Axes
        Drawn on.
    rows : pandas.DataFrame
        What is drawn.
    x, y : str
        Columns of the axes.
    looks : mapping
        Group to its colour and marker, in the order of the legend.
    by, at : str
        Column of the groups, and that of the places (by default `x`): rows of one place are seeds.
    **style
        As for `Axes.plot`.

    Returns
    -------
    dict
        Group to the points ``x, y`` of its line.
    """
    means = {}
    for name, look in looks.items():
        own = rows[rows[by] == name]
        if own.empty:
            continue
        places = own.groupby(own[at or x])[[x, y]]
        means[name] = places.mean()
        axis.plot(
            *means[name].to_numpy().T, **{"ms": 4.5, "lw": 1.2, "label": name, **style, **look}
        )
        if places.size().max() > 1:
            dots = {"marker": ".", "ms": 4, "ls": "", "alpha": 0.6, "label": _SEED}
            axis.plot(own[x], own[y], color=look["color"], **dots)
    return means


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
    numbers = np.asarray(list(values), dtype=float)
    numbers = numbers[np.isfinite(numbers) & (numbers > 0)]
    low, high = (numbers.min(), numbers.max()) if len(numbers) else (1, 1)
    if high > 10 * low:
        axis.set_ticks(*log_ticks(low / 1.2, high * 1.2))
        if high < 1e5 * low:
            axis.set_major_formatter(words)
    else:
        axis.set_major_locator(
            MaxNLocator(n, steps=[1, 2, 5, 10]) if high < 2 * low else _even_marks(low, high, n)
        )
        axis.set_major_formatter(words)
        axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def _even_marks(low: float, high: float, n: int) -> FixedLocator:
    """At most `n` round numbers that are about evenly far apart on a log axis."""
    powers = 10.0 ** np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 1)
    finer = [(1, 1.5, 2, 3, 4, 5, 7), (1, 1.5, 2, 3, 5, 7), (1, 2, 3, 5), (1, 2, 5), (1, 3)]
    for steps in finer:
        marks = [m for m in np.outer(powers, steps).ravel() if low / 1.1 <= m <= high * 1.1]
        if len(marks) <= n:
            break
    return FixedLocator(marks)


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


def spread(rows: pd.DataFrame, middle: str, low: str = "low", high: str = "high") -> np.ndarray:
    """Lengths below and above the middle ``[2, row]``, as `Axes.errorbar` wants them."""
    return np.maximum([rows[middle] - rows[low], rows[high] - rows[middle]], 0)


def dot_rows(
    axis: Axes,
    rows: pd.DataFrame,
    columns: tuple[str, str, str],
    words: Callable[[float], str],
    *,
    filled: Iterable[bool] | None = None,
    **look,
) -> None:
    """A dot with its interval and its number per row, from the top.

    Parameters
    ----------
    axis : matplotlib.axes.Axes
        Drawn on.
    rows : pandas.DataFrame
        Indexed by the names of the rows.
    columns : tuple of str
        The middle and the ends of its interval.
    words : callable
        A value to the number above its dot.
    filled : iterable of bool, optional
        By row; the others are hollow. By default all.
    **look
        As for `Axes.errorbar`.
    """
    lengths = spread(rows, *columns)
    filled = [True] * len(rows) if filled is None else filled
    box = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # not in the line of the interval
    style = {"xytext": (0, 6), "textcoords": "offset points", "ha": "center", "fontsize": 7.5}
    for place, (value, fill) in enumerate(zip(rows[columns[0]], filled, strict=True)):
        how = look | ({} if fill else {"mfc": "white"})
        axis.errorbar(value, place, xerr=lengths[:, [place]], capsize=3, **how)
        axis.annotate(words(value), (value, place), bbox=box, **style)
    axis.set_yticks(range(len(rows)), rows.index)
    axis.set_ylim(len(rows) - 0.5, -0.8)


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
    axis.tick_params(axis="x", rotation=30)
    axis.tick_params(axis="y", rotation=0)
    axis.grid(False)


def key(label: str, **look) -> Line2D:
    """An entry of a legend that stands for no single line: grey, unless `look` says more."""
    return Line2D([], [], **{"color": "#555555", "ls": "", "marker": "o", "label": label, **look})


def two_way_keys(by_colour: Looks, by_marker: Looks) -> list[Line2D]:
    """Entries of groups told apart by their colours, then of those told apart by their markers."""
    lines = {name: {"color": look["color"], "ls": "-"} for name, look in by_colour.items()}
    colours = [key(name, marker="", **look) for name, look in lines.items()]
    return colours + [key(name, marker=look["marker"]) for name, look in by_marker.items()]


def side_legend(figure: Figure, *keys: Line2D) -> None:
    """Legend beside all axes: each label of theirs once, then further keys."""
    entries = {}
    for axis in figure.axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    if _SEED in entries:
        entries[_SEED] = entries.pop(_SEED)  # last
    entries |= {str(each.get_label()): each for each in keys}
    figure.legend([*entries.values()], [*entries], loc="outside right upper")
