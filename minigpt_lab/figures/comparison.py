"""Runs and methods beside each other: size against loss, and against speed."""

from __future__ import annotations

import textwrap

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from ..checks import OneOf, checked
from .axes import group_lines, key, log_labels, panel_row, side_legend, spread, two_way_keys
from .frames import draws_frame
from .style import METHOD_STYLE, VARIANT_STYLE, looks, new_figure, with_note

_HIGHEST = 30  # times the dense perplexity; methods above are named, not drawn
_FADED = 0.3
_AXES = {"stored": "parameters stored", "nonzero": "parameters not zero"}


@checked(size=OneOf(_AXES))
@draws_frame(
    names="model protocol text domain method",
    numbers="perplexity perplexity_ratio front",
    empty=True,
)
def pareto_front(table: pd.DataFrame, *, size: str = "stored", caption: str = "") -> Figure:
    """Size against held-out perplexity of every run, with the front of each domain.

    A panel per model and protocol, as only their perplexities compare. Colour: domain; marker:
    method. The front is a step line, dominated models are faded, the dense model is a star.

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
    table = table[table[size] > 0].dropna(subset=["perplexity"])
    panels = list(table.groupby(["model", "protocol"], sort=False))
    columns, rows = min(max(len(panels), 1), 2), max(1, -(-len(panels) // 2))
    question = "How small can a model get, at what loss?"
    figure = new_figure(4.2 * columns + 2.2, 3.4 * rows + 0.6, caption, question)
    if not panels:
        figure.text(0.5, 0.5, "no run has a size and a perplexity yet", ha="center")
        return figure
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    domains, methods = looks(table["domain"]), looks(table["method"], METHOD_STYLE)
    for axis, ((model, protocol), points) in zip(axes, panels, strict=False):
        _front_panel(axis, points, size, domains, methods)
        title = f"{textwrap.fill(model, 64)}\n{protocol}"
        axis.set_title(title, fontsize=8)
        axis.set(xlabel=_AXES[size], ylabel="test perplexity")
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    keys = two_way_keys(domains, methods)
    if not table["front"].all():
        keys.append(key("not on the front", alpha=_FADED))
    side_legend(figure, *keys)
    figure.draw_without_rendering()  # lays it out: distances below are those of the picture
    for axis, (_, points) in zip(axes, panels, strict=False):
        points = points[points["front"] & (points["method"] != "dense")]
        _label_front(axis, points, size, domains)
    return figure


@draws_frame(names="text variant", numbers="bytes bits_per_character bits_low bits_high")
def size_and_loss(table: pd.DataFrame, *, caption: str = "") -> Figure:
    """Bytes of the weights against bits per character, a panel per text, a point per variant.

    Parameters
    ----------
    table : pandas.DataFrame
        Columns ``text, variant, bytes, bits_per_character, bits_low, bits_high`` (95 %).
    caption : str
        Model, text, protocol.
    """
    title = "How small, and at what loss?"
    figure, panels = panel_row(table, "text", caption, title, size=(3.8, 3.8), sharex=True)
    styles = looks(table["variant"], VARIANT_STYLE)
    for axis, _, rows in panels:
        lengths = np.nan_to_num(spread(rows, "bits_per_character", "bits_low", "bits_high"))
        for place, row in enumerate(rows.itertuples()):
            bar = {"yerr": lengths[:, [place]], "lw": 1, "ms": 8, **styles[row.variant]}
            axis.errorbar(row.bytes / 1e6, row.bits_per_character, **bar)
        axis.set(xscale="log", yscale="log", xlabel="weights in MB")
        log_labels(axis.xaxis, rows["bytes"] / 1e6, n=4)
        log_labels(axis.yaxis, rows["bits_per_character"])
        axis.margins(0.12)
    figure.axes[0].set_ylabel("bits per character (lower is better)")
    side_legend(figure, *(key(name, **look) for name, look in styles.items()))
    return figure


def _front_panel(
    axis: Axes, rows: pd.DataFrame, size: str, domains: dict[str, dict], methods: dict[str, dict]
) -> None:
    """Points of every method, and a step line through those on the front of a text."""
    axis.set(xscale="log", yscale="log")
    for (domain, _), text in rows.groupby(["domain", "text"], sort=False):
        front = text[text["front"]].sort_values(size)
        tint = domains[domain]["color"]
        axis.step(front[size], front["perplexity"], where="post", color=tint, lw=1.2)
        for (method, on_front), points in text.groupby(["method", "front"], sort=False):
            look = methods[method] | {"color": tint, "alpha": 1.0 if on_front else _FADED}
            ms = 13 if method == "dense" else 6
            axis.plot(points[size], points["perplexity"], ls="", ms=ms, **look)
    for side, column in ((axis.xaxis, size), (axis.yaxis, "perplexity")):
        log_labels(side, rows[column], n=4, words=lambda value, _: _millions(value))
    axis.margins(0.12)


def _millions(value: float) -> str:
    """A number in three digits: 0.135 M parameters, 23.4."""
    return f"{value / 1e6:.3g} M" if value >= 1e5 else f"{value:.3g}"


def _label_front(axis: Axes, points: pd.DataFrame, size: str, domains: dict[str, dict]) -> None:
    """Write beside each point of a front what it costs, unless another label is in the way."""
    taken = []
    for point in points.sort_values([size, "perplexity"]).to_dict("records"):
        corner = (point[size], point["perplexity"])
        place = axis.transData.transform(corner) * 72 / axis.figure.dpi
        if any((np.abs(place - other) < (36, 12)).all() for other in taken):  # points
            continue
        taken.append(place)
        where = {"xytext": (5, 5), "textcoords": "offset points", "fontsize": 7}
        halo = [withStroke(linewidth=2, foreground="white")]  # on top of lines
        words = f"×{point['perplexity_ratio']:.3g}"
        tint = domains[point["domain"]]["color"]
        axis.annotate(words, corner, color=tint, path_effects=halo, **where)


@draws_frame(names="method sites text", numbers="ratio stored perplexity")
def method_curves(table: pd.DataFrame, *, caption: str = "") -> Figure:
    """Held-out perplexity against size: a line per method, a column per site, a row per text.

    Where a method has several rows of one ratio (seeds), they are dots and the line is their mean.
    If all methods have but one ratio, a method is a row, and a text a column: see `_method_rows`.

    Parameters
    ----------
    table : pandas.DataFrame
        From `minigpt_lab.studies.method_comparison`: columns ``method, sites, ratio, stored, text,
        perplexity``; rows of the method ``dense`` give the level to compare with.
    caption : str
        Model, calibration, protocol.
    """
    dense, pruned = table[table["method"] == "dense"], table[table["method"] != "dense"]
    pruned = pruned.assign(millions=pruned["stored"] / 1e6)
    texts, sites = (list(pruned[name].unique()) for name in ("text", "sites"))
    title = "Which way of choosing costs least, at the same size?"
    if pruned["ratio"].nunique() == 1:
        return _method_rows(dense, pruned, caption, title)
    figure = new_figure(max(3.0 * len(sites) + 2.2, 8.0), 2.8 * len(texts) + 0.7, caption, title)
    axes = figure.subplots(len(texts), len(sites), sharex="col", sharey="row", squeeze=False)
    styles = looks(pruned["method"], METHOD_STYLE)
    for row, text in zip(axes, texts, strict=True):
        part = pruned[pruned["text"] == text]
        level = dense.loc[dense["text"] == text, "perplexity"].mean()
        drawn = part["perplexity"] <= _HIGHEST * level  # the others would press these together
        for axis, each in zip(row, sites, strict=True):
            rows = part[part["sites"] == each]
            group_lines(axis, rows, "millions", "perplexity", styles, by="method", at="ratio", ms=5)
            axis.axhline(level, color="black", ls="--", lw=1, label="dense")
            best = rows.groupby("method", sort=False)["perplexity"].min()
            beyond = ", ".join(best.index[best > _HIGHEST * level])
            note = textwrap.fill(f"above the scale: {beyond}", 46) if beyond else ""
            axis.set_title(f"{each}: {text}\n{note}".strip(), fontsize=8.5)
        shown = [level, *part.loc[drawn, "perplexity"]]
        row[0].set(yscale="log", ylabel="test perplexity")
        log_labels(row[0].yaxis, shown)
        row[0].set_ylim(level / 1.25, 1.25 * max(shown))
    for axis in axes[-1]:
        axis.set_xlabel("stored parameters (millions)")
        axis.ticklabel_format(axis="x", useOffset=False)
    side_legend(figure)
    return figure


def _method_rows(dense: pd.DataFrame, pruned: pd.DataFrame, caption: str, title: str) -> Figure:
    """Methods at one size: a row for each, the best on the first text on top; texts beside."""
    texts, sites = (list(pruned[name].unique()) for name in ("text", "sites"))
    if "low" in pruned:
        caption = with_note(caption, "bar: 95 % interval, from the passages of the text")
    else:
        pruned = pruned.assign(low=pruned["perplexity"], high=pruned["perplexity"])
    height = 0.34 * pruned["method"].nunique() * len(sites) + 1.2
    figure = new_figure(3.4 * len(texts) + 2.6, height, caption, title)
    axes = figure.subplots(len(sites), len(texts), sharex="col", sharey="row", squeeze=False)
    styles = looks(pruned["method"], METHOD_STYLE)
    for row, each in zip(axes, sites, strict=True):
        order = None
        for axis, text in zip(row, texts, strict=True):
            samples = pruned[(pruned["sites"] == each) & (pruned["text"] == text)]
            means = samples.groupby("method")[["perplexity", "low", "high"]].mean()
            order = means["perplexity"].sort_values().index if order is None else order
            level = dense.loc[dense["text"] == text, "perplexity"].mean()
            _method_panel(axis, means.reindex(order), samples, level, styles)
            axis.set_title(f"{each}: {text}", fontsize=8.5)
    for axis in axes[-1]:
        axis.set_xlabel("test perplexity")
    side_legend(figure)
    return figure


def _method_panel(
    axis: Axes, means: pd.DataFrame, samples: pd.DataFrame, level: float, styles: dict[str, dict]
) -> None:
    """The mean of each method with its interval, a small dot per sample, dense as a line."""
    beyond = means["perplexity"] > _HIGHEST * level  # they would press the others together
    lengths = spread(means, "perplexity")
    for place, (method, mean) in enumerate(means["perplexity"].items()):
        if beyond[method]:
            edge = {"transform": axis.get_yaxis_transform(), "ha": "right", "va": "center"}
            axis.text(0.99, place, f"{mean:,.0f} →", fontsize=8, **edge)
            continue
        dots = samples.loc[samples["method"] == method, "perplexity"]
        bar = {"xerr": lengths[:, [place]], "lw": 1, "capsize": 2, "ms": 5.5, **styles[method]}
        axis.errorbar(mean, place, **bar)
        if len(dots) > 1:
            small = {"ls": "", "marker": ".", "ms": 4, "label": "one calibration sample"}
            axis.plot(dots, [place + 0.28] * len(dots), color=styles[method]["color"], **small)
    axis.axvline(level, color="black", ls="--", lw=1, label="dense")
    drawn = means.loc[~beyond, ["perplexity", "low", "high"]].to_numpy().ravel()
    axis.set(xscale="log", ylim=(len(means) - 0.4, -0.6))
    log_labels(axis.xaxis, [level, *drawn])
    axis.set_yticks(range(len(means)), means.index)


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
        From `block_influence` of whole layers: columns ``layer, influence``.
    """
    figure = new_figure(6.4, 2.8, caption, "Which layers should be kept whole?")
    axis = figure.subplots()
    axis.bar(influence["layer"], influence["influence"], color="#0072B2")
    axis.set(xlabel="layer", ylabel="1 − cosine of\ninput and output")
    axis.xaxis.set_major_locator(MaxNLocator(12, integer=True))
    return figure


@draws_frame(names="variant kind device", numbers="stored tokens_per_second low high batch runs")
def throughput(speeds: pd.DataFrame, *, caption: str = "") -> Figure:
    """Tokens per second against stored parameters, a panel for reading and one for writing.

    Parameters
    ----------
    speeds : pandas.DataFrame
        Columns ``variant, stored, kind`` (prefill, decode, …), ``tokens_per_second`` (median over
        the runs), ``low, high`` (its spread, such as the quartiles), ``batch, device, runs``. A
        variant named ``dense`` gives the line of a speed that is in proportion to the size.
    caption : str
        Model, lengths of prompt and continuation, meaning of the spread.
    """
    speeds = speeds.assign(millions=speeds["stored"] / 1e6)
    batch, device, runs = (
        "/".join(speeds[fact].astype(str).unique()) for fact in ("batch", "device", "runs")
    )
    caption = with_note(caption, f"batch {batch}, on {device}, n = {runs} runs each")
    title = "Does a smaller model run faster?"
    figure, panels = panel_row(speeds, "kind", caption, title, size=(3.1, 3.6), sharex=True)
    styles = looks(speeds["variant"], VARIANT_STYLE)
    for axis, _, part in panels:
        for name, rows in part.groupby("variant", sort=False):
            dot = {"ls": "", "ms": 6, "mfc": "none", "capsize": 3, "label": name, **styles[name]}
            lengths = spread(rows, "tokens_per_second")
            axis.errorbar(rows["millions"], rows["tokens_per_second"], yerr=lengths, **dot)
        for dense in part[part["variant"] == "dense"].itertuples():
            sizes = np.linspace(part["millions"].min(), part["millions"].max())
            line = {"color": "black", "ls": ":", "lw": 1, "label": "in proportion to the size"}
            axis.plot(sizes, dense.tokens_per_second * dense.millions / sizes, zorder=1, **line)
        axis.set_xlabel("stored parameters (millions)")
        axis.set_ylim(bottom=0)
        axis.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axis.locator_params(nbins=5)
    figure.axes[0].set_ylabel("tokens per second (median and spread)")
    side_legend(figure)
    return figure
