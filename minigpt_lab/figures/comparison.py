"""Runs beside each other, from their records: a frame in, a figure out."""

from __future__ import annotations

import itertools
import textwrap

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator, NullFormatter, NullLocator

from ..checks import InvalidArgument, OneOf
from .frames import drawn
from .style import METHOD_STYLE, colour, log_labels, log_ticks, new_figure, side_legend, style_for

_REACH = 30  # times the dense perplexity; what is worse is named, not drawn

_BASELINES = {"random": "x", "magnitude": "+"}
_MARKERS = ("o", "D", "s", "^", "v", "P", "h")
_GREY, _FADED = "#8C8C8C", 0.3
_AXES = {"stored": "parameters stored", "nonzero": "parameters not zero"}
_LABELS_APART = 12  # points, between two labels


@drawn(
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
    domains, methods = list(dict.fromkeys(table["domain"])), list(dict.fromkeys(table["method"]))
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
    handles = [Line2D([], [], color=colour(d, domains), lw=1.5, label=d) for d in domains]
    handles += [
        Line2D([], [], color=_GREY if method in _BASELINES else "#333333", marker=marker, ls="",
               ms=11 if method == "dense" else 6, label=method)
        for method, marker in markers.items()
    ]  # fmt: skip
    if (~table["front"].astype(bool) & (table["method"] != "dense")).any():
        handles.append(Line2D([], [], color="#333333", marker="o", ls="", alpha=_FADED,
                              label="not on the front"))  # fmt: skip
    figure.legend(handles=handles, loc="outside right upper", fontsize=8)
    figure.draw_without_rendering()  # lays it out: distances below are those of the picture
    for axis, (_, rows) in zip(axes, panels, strict=False):
        _label_front(axis, rows[rows["front"] & (rows["method"] != "dense")], size, domains)
    return figure


def _panel(axis: Axes, rows: pd.DataFrame, size: str, domains: list[str], markers: dict) -> None:
    axis.set(xscale="log", yscale="log")
    for domain, own in rows.groupby("domain", sort=False):
        tint = colour(domain, domains)
        for _, text in own.groupby("text", sort=False):
            front = text[text["front"]].sort_values(size)
            axis.step(front[size], front["perplexity"], where="post", color=tint, lw=1.2)
        for (method, on_front), points in own.groupby(["method", "front"], sort=False):
            shade = _GREY if method in _BASELINES else tint
            faded = 1.0 if on_front or method == "dense" else _FADED
            axis.plot(points[size], points["perplexity"], markers[method], color=shade,
                      ms=13 if method == "dense" else 6, alpha=faded)  # fmt: skip
    for reach, values in ((axis.xaxis, rows[size]), (axis.yaxis, rows["perplexity"])):
        _few_ticks(reach, values.to_numpy())
    axis.margins(0.12)


def _few_ticks(axis, values: np.ndarray) -> None:
    """Readable numbers on a log axis, whether it spans a tenth of a decade or five."""
    low, high = values.min(), values.max()
    if high > 10 * low:
        axis.set_ticks(*log_ticks(low / 1.2, high * 1.2))
    else:
        axis.set_major_locator(MaxNLocator(4))
        axis.set_major_formatter(lambda value, _: _short(value))
        axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def _short(value: float) -> str:
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
        label = axis.annotate(
            f"×{point['perplexity_ratio']:.3g}", (point[size], point["perplexity"]), xytext=(5, 5),
            textcoords="offset points", fontsize=7, color=colour(point["domain"], domains),
        )  # fmt: skip
        label.set_path_effects([withStroke(linewidth=2, foreground="white")])  # on top of lines


@drawn(names="method sites text", numbers="stored perplexity")
def method_curves(table: pd.DataFrame, *, caption: str = "") -> Figure:
    """Held-out perplexity against size: a line per method, a column per site, a row per text.

    Where a method has several rows of one size (seeds), the line is their median in their range.

    Parameters
    ----------
    table : pandas.DataFrame
        From `minigpt_lab.studies.methods.method_comparison`: columns ``method, sites, stored, text,
        perplexity, low, high``; rows of the method ``dense`` give the level to compare with.
    caption : str
        Model, calibration, protocol.
    """
    dense, cuts = table[table["method"] == "dense"], table[table["method"] != "dense"]
    texts, kinds = (list(dict.fromkeys(cuts[name])) for name in ("text", "sites"))
    methods = list(dict.fromkeys(cuts["method"]))
    question = "Which way of choosing costs least, at the same size?"
    figure = new_figure(max(3.0 * len(kinds) + 2.2, 8.0), 2.7 * len(texts) + 0.7, caption, question)
    axes = figure.subplots(len(texts), len(kinds), sharex="col", sharey="row", squeeze=False)
    for row, text in zip(axes, texts, strict=True):
        level = dense.loc[dense["text"] == text, "perplexity"].iloc[0]
        for axis, kind in zip(row, kinds, strict=True):
            part = cuts[(cuts["text"] == text) & (cuts["sites"] == kind)]
            for name, points in part.groupby("method", sort=False):
                tint, marker = style_for(name, methods, METHOD_STYLE)
                found = points.groupby("stored")["perplexity"].agg(["median", "min", "max"])
                sizes = found.index / 1e6
                axis.fill_between(sizes, found["min"], found["max"], color=tint, alpha=0.2, lw=0)
                axis.plot(sizes, found["median"], color=tint, marker=marker, ms=4, lw=1.2,
                          label=name)  # fmt: skip
            axis.axhline(level, color="black", ls="--", lw=1, label="dense")
            axis.set(yscale="log")
            axis.set_title(f"{kind}: {text}", fontsize=9, fontweight="normal")
            lowest = part.groupby("method", sort=False)["perplexity"].min()
            beyond = ", ".join(lowest.index[lowest > _REACH * level])
            if beyond:  # they would press all others onto one line
                words = textwrap.fill(f"above the scale: {beyond}", 40)
                box = {"fc": "white", "ec": "none", "alpha": 0.8, "pad": 1}
                axis.annotate(words, (0.02, 0.98), fontsize=7, va="top", bbox=box,
                              xycoords="axes fraction")  # fmt: skip
        shown = cuts.loc[cuts["text"] == text, "perplexity"]
        shown = shown[shown <= _REACH * level]
        log_labels(row[0].yaxis, [level, *shown])
        row[0].set_ylim(level / 1.25, 2.5 * max([level, *shown]))  # room for the words above
        row[0].set_ylabel("test perplexity")
    for axis in axes[-1]:
        axis.set_xlabel("stored parameters (millions)")
    side_legend(figure, axes[0, 0])
    return figure


@drawn(numbers="directions cosine expected")
def cosine_curve(cosines: pd.DataFrame, *, caption: str = "") -> Figure:
    """Cosine of zeroth-order estimates to the true gradient, against the number of directions.

    Parameters
    ----------
    cosines : pandas.DataFrame
        From `minigpt_lab.spsa.cosine_curve`: columns ``directions, cosine, expected``, a row per
        seed.
    """
    question = "How much of the gradient does an estimate see?"
    figure = new_figure(5.4, 3.4, caption, question)
    axis = figure.subplots()
    level = cosines.groupby("directions")["expected"].first()
    axis.plot(level.index, level, color="black", ls="--", lw=1, label="√(directions ÷ weights)")
    axis.plot(cosines["directions"], cosines["cosine"], "o", color="#0072B2", mfc="none", ms=6,
              label="estimate, a dot per seed")  # fmt: skip
    axis.axhline(0, color="black", lw=0.8)
    axis.set(xscale="log", xlabel="random directions", ylabel="cosine to the true gradient")
    axis.set_xticks(level.index, [f"{n:,}" for n in level.index])
    axis.minorticks_off()
    axis.legend(loc="upper left", fontsize=8)
    return figure


@drawn(numbers="layer influence")
def influence_bars(influence: pd.DataFrame, *, caption: str = "") -> Figure:
    """How much every decoder layer changes what passes through it.

    Parameters
    ----------
    influence : pandas.DataFrame
        From `block_influence`: columns ``layer, influence``.
    """
    figure = new_figure(6.4, 2.8, caption, "Which layers had better stay whole?")
    axis = figure.subplots()
    axis.bar(influence["layer"], influence["influence"], color="#0072B2")
    axis.set(xlabel="layer", ylabel="1 − cosine of\ninput and output")
    axis.xaxis.set_major_locator(MaxNLocator(12, integer=True))
    return figure
