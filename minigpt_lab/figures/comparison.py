"""Runs and methods beside each other."""

from __future__ import annotations

import itertools
import textwrap

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from ..checks import InvalidArgument, OneOf
from .axes import line_with_range, log_labels, side_legend
from .frames import draws_frame
from .style import METHOD_STYLE, colour, new_figure, style_for

_HIGHEST = 30  # times the dense perplexity; methods above are named, not drawn
_BASELINES = {"random": "x", "magnitude": "+"}
_MARKERS = ("o", "D", "s", "^", "v", "P", "h")
_GREY, _FADED = "#8C8C8C", 0.3
_AXES = {"stored": "parameters stored", "nonzero": "parameters not zero"}
_LABELS_APART = 12  # points, between two labels


@draws_frame(
    names="model protocol text domain method",
    numbers="perplexity",
    maybe="perplexity_ratio",
    flags="front",
    empty=True,
)
def pareto_front(table: pd.DataFrame, *, size: str = "stored", caption: str = "") -> Figure:
    """Size against held-out perplexity of every run, with the front of each domain.

    A panel per model and protocol, as only their perplexities compare. Colour: domain; marker:
    method. The front is a step line, dominated models are faded, baselines grey, the dense model is
    a star.

    Parameters
    ----------
    table : pandas.DataFrame
        Columns ``model, protocol, text, domain, method, perplexity, perplexity_ratio, front``
        (bool), and the one named by `size`, as `minigpt_lab.experiments.comparisons`
        makes them.
    size : {"stored", "nonzero"}
        The column of sizes, in parameters.
    caption : str
        What the reader must know of the runs.

    """
    OneOf(_AXES)("size", size)
    if size not in table:
        raise InvalidArgument(f"table has no column {size!r}; comparisons.measurements makes it")
    table = table[table[size] > 0].dropna(subset=[size, "perplexity"])
    panels = list(table.groupby(["model", "protocol"], sort=False))
    columns = 2 if len(panels) > 1 else 1
    height = max(1, -(-len(panels) // columns))
    question = "How small can a model get, at what loss?"
    figure = new_figure(4.2 * columns + 2.2, 3.4 * height + 0.6, caption, question)
    if not panels:
        figure.text(0.5, 0.5, "no run has a size and a perplexity yet", ha="center")
        return figure
    axes = figure.subplots(height, columns, squeeze=False).ravel()
    domains, methods = list(table["domain"].unique()), list(table["method"].unique())
    free = itertools.cycle(_MARKERS)
    markers = {
        method: _BASELINES.get(method) or ("*" if method == "dense" else next(free))
        for method in methods
    }
    for axis, ((model, protocol), rows) in zip(axes, panels, strict=False):
        _panel(axis, rows, size, domains, markers)
        title = f"{textwrap.fill(model, 64)}\n{protocol}"
        axis.set_title(title, fontsize=8, fontweight="normal")
        axis.set_xlabel(_AXES[size])
        axis.set_ylabel("test perplexity")
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    faded = (~table["front"].astype(bool) & (table["method"] != "dense")).any()
    figure.legend(handles=_front_handles(domains, markers, faded=faded), loc="outside right upper")
    figure.draw_without_rendering()  # lays it out: distances below are those of the picture
    for axis, (_, rows) in zip(axes, panels, strict=False):
        _label_front(axis, rows[rows["front"] & (rows["method"] != "dense")], size, domains)
    return figure


def _front_handles(domains: list[str], markers: dict[str, str], *, faded: bool) -> list[Line2D]:
    handles = [Line2D([], [], color=colour(d, domains), lw=1.5, label=d) for d in domains]
    for method, marker in markers.items():
        tint = _GREY if method in _BASELINES else "#333333"
        size = 11 if method == "dense" else 6
        handles.append(Line2D([], [], color=tint, marker=marker, ls="", ms=size, label=method))
    if faded:
        look = {"color": "#333333", "marker": "o", "ls": "", "alpha": _FADED}
        handles.append(Line2D([], [], label="not on the front", **look))
    return handles


def _panel(axis: Axes, rows: pd.DataFrame, size: str, domains: list[str], markers: dict) -> None:
    axis.set(xscale="log", yscale="log")
    for domain, own in rows.groupby("domain", sort=False):
        tint = colour(domain, domains)
        for _, text in own.groupby("text", sort=False):
            front = text[text["front"]].sort_values(size)
            axis.step(front[size], front["perplexity"], where="post", color=tint, lw=1.2)
        for (method, on_front), points in own.groupby(["method", "front"], sort=False):
            look = {"color": _GREY if method in _BASELINES else tint}
            look["alpha"] = 1.0 if on_front or method == "dense" else _FADED
            look["ms"] = 13 if method == "dense" else 6
            axis.plot(points[size], points["perplexity"], markers[method], **look)
    for side, column in ((axis.xaxis, size), (axis.yaxis, "perplexity")):
        log_labels(side, rows[column], n=4, words=lambda value, _: _millions(value))
    axis.margins(0.12)


def _millions(value: float) -> str:
    """A number in three digits: 0.135 M parameters, 23.4."""
    return f"{value / 1e6:.3g} M" if value >= 1e5 else f"{value:.3g}"


def _label_front(axis: Axes, points: pd.DataFrame, size: str, domains: list[str]) -> None:
    """Write beside each point of a front what it costs, unless another label is in the way."""
    taken = []
    for _, point in points.sort_values([size, "perplexity"]).iterrows():
        place = axis.transData.transform((point[size], point["perplexity"]))
        place = place * 72 / axis.figure.dpi
        gaps = [np.abs(place - other) for other in taken]
        if any(gap[0] < 3 * _LABELS_APART and gap[1] < _LABELS_APART for gap in gaps):
            continue
        taken.append(place)
        where = {"xytext": (5, 5), "textcoords": "offset points", "fontsize": 7}
        corner = (point[size], point["perplexity"])
        tint = colour(point["domain"], domains)
        label = axis.annotate(f"×{point['perplexity_ratio']:.3g}", corner, color=tint, **where)
        label.set_path_effects([withStroke(linewidth=2, foreground="white")])  # on top of lines


@draws_frame(names="method sites text", numbers="stored perplexity")
def method_curves(table: pd.DataFrame, *, caption: str = "") -> Figure:
    """Held-out perplexity against size: a line per method, a column per site, a row per text.

    Where a method has several rows of one size (seeds), the line is their median in their range.

    Parameters
    ----------
    table : pandas.DataFrame
        From `minigpt_lab.studies.method_comparison`: columns ``method, sites, stored, text,
        perplexity, low, high``; rows of the method ``dense`` give the level to compare with.
    caption : str
        Model, calibration, protocol.
    """
    dense, pruned = table[table["method"] == "dense"], table[table["method"] != "dense"]
    pruned = pruned.assign(millions=pruned["stored"] / 1e6)
    texts, sites, methods = (list(pruned[name].unique()) for name in ("text", "sites", "method"))
    title = "Which way of choosing costs least, at the same size?"
    figure = new_figure(max(3.0 * len(sites) + 2.2, 8.0), 2.7 * len(texts) + 0.7, caption, title)
    axes = figure.subplots(len(texts), len(sites), sharex="col", sharey="row", squeeze=False)
    for row, text in zip(axes, texts, strict=True):
        part = pruned[pruned["text"] == text]
        level = dense.loc[dense["text"] == text, "perplexity"].iloc[0]
        for axis, each in zip(row, sites, strict=True):
            _method_panel(axis, part[part["sites"] == each], methods, level)
            axis.set_title(f"{each}: {text}")
        shown = [level, *part.loc[part["perplexity"] <= _HIGHEST * level, "perplexity"]]
        log_labels(row[0].yaxis, shown)
        row[0].set_ylim(level / 1.25, 2.5 * max(shown))  # room for the words above
        row[0].set_ylabel("test perplexity")
    for axis in axes[-1]:
        axis.set_xlabel("stored parameters (millions)")
    side_legend(figure, axes[0, 0])
    return figure


def _method_panel(axis: Axes, part: pd.DataFrame, methods: list[str], level: float) -> None:
    """A line per method; those far above the dense level would press all others onto one line."""
    for name, points in part.groupby("method", sort=False):
        tint, marker = style_for(name, methods, METHOD_STYLE)
        look = {"color": tint, "marker": marker, "ms": 4, "lw": 1.2, "label": name}
        line_with_range(axis, points.groupby("millions")["perplexity"], **look)
    axis.axhline(level, color="black", ls="--", lw=1, label="dense")
    axis.set(yscale="log")
    lowest = part.groupby("method", sort=False)["perplexity"].min()
    beyond = ", ".join(lowest.index[lowest > _HIGHEST * level])
    if beyond:
        words = textwrap.fill(f"above the scale: {beyond}", 40)
        look = {"bbox": {"fc": "white", "ec": "none", "alpha": 0.8, "pad": 1}, "fontsize": 7}
        axis.annotate(words, (0.02, 0.98), xycoords="axes fraction", va="top", **look)


@draws_frame(numbers="directions cosine expected")
def cosine_curve(cosines: pd.DataFrame, *, caption: str = "") -> Figure:
    """Cosine of zeroth-order estimates to the true gradient, against the number of directions.

    Parameters
    ----------
    cosines : pandas.DataFrame
        From `minigpt_lab.studies.cosine_curve`: columns ``directions, cosine, expected``, a row per
        seed.
    """
    question = "How much of the gradient does an estimate see?"
    figure = new_figure(5.4, 3.4, caption, question)
    axis = figure.subplots()
    level = cosines.groupby("directions")["expected"].first()
    axis.plot(level.index, level, color="black", ls="--", lw=1, label="√(directions ÷ weights)")
    hollow = {"color": "#0072B2", "mfc": "none", "ms": 6, "label": "estimate, a dot per seed"}
    axis.plot(cosines["directions"], cosines["cosine"], "o", **hollow)
    axis.axhline(0, color="black", lw=0.8)
    axis.set(xscale="log", xlabel="random directions", ylabel="cosine to the true gradient")
    axis.set_xticks(level.index, [f"{n:,}" for n in level.index])
    axis.minorticks_off()
    axis.legend(loc="upper left")
    return figure


@draws_frame(numbers="layer influence")
def influence_bars(influence: pd.DataFrame, *, caption: str = "") -> Figure:
    """Block influence of every decoder layer.

    Parameters
    ----------
    influence : pandas.DataFrame
        From `block_influence`: columns ``layer, influence``.
    """
    figure = new_figure(6.4, 2.8, caption, "Which layers should be kept whole?")
    axis = figure.subplots()
    axis.bar(influence["layer"], influence["influence"], color="#0072B2")
    axis.set(xlabel="layer", ylabel="1 − cosine of\ninput and output")
    axis.xaxis.set_major_locator(MaxNLocator(12, integer=True))
    return figure
