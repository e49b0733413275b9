"""Recovery, multiple choice, and pruned models on the texts of other domains."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter, StrMethodFormatter

from .axes import heat, line_with_range, log_labels, short_number, side_legend, spread
from .frames import draws_frame
from .style import METHOD_STYLE, VARIANT_STYLE, colour, new_figure, style_for, with_note


@draws_frame(names="regime method", numbers="tokens perplexity other_perplexity")
def recovery_curves(
    histories: pd.DataFrame, *, dense: Mapping[str, float], caption: str = ""
) -> Figure:
    """Held-out perplexity against tokens trained on, a panel per regime, a colour per method.

    Filled markers are of the domain, hollow ones of the other text. A ring marks the best
    checkpoint, chosen on the validation text that is drawn.

    Parameters
    ----------
    histories : pandas.DataFrame
        Columns ``regime, method, tokens, perplexity, other_perplexity``, as `recover` returns them.
        Several rows at one point (seeds) are drawn as their median and their range.
    dense : mapping
        Name of the domain and of the other one to the dense model's perplexity, in this order.
    caption : str
        Model, text, protocol.
    """
    regimes, methods = (list(histories[name].unique()) for name in ("regime", "method"))
    columns = ("perplexity", "other_perplexity")
    question = "Does a short fine-tune bring the model back, and what does it forget?"
    note = "each panel has its own scale"
    figure = new_figure(3.6 * len(regimes) + 2, 4.0, with_note(caption, note), question)
    axes = figure.subplots(1, len(regimes), squeeze=False).ravel()
    own_level = next(iter(dense.values()))
    for axis, regime in zip(axes, regimes, strict=True):
        part = histories[histories["regime"] == regime]
        for method, rows in part.groupby("method", sort=False):
            tint, marker = style_for(method, methods, METHOD_STYLE)
            look = {"color": tint, "marker": marker, "ms": 4.5, "lw": 1.3}
            own, _ = (
                line_with_range(axis, rows.groupby("tokens")[column], **look, **how)
                for column, how in zip(columns, _TEXTS, strict=True)
            )
            axis.plot(own.idxmin(), own.min(), "o", ms=11, mfc="none", mec=tint, mew=1.4)
            reached = own[own <= own_level].head(1)
            axis.plot(reached.index, reached, "*", ms=15, color=tint, mec="black")
        for level, line in zip(dense.values(), _LEVELS, strict=True):
            axis.axhline(level, color="black", lw=1, ls=line)
        axis.set(yscale="log", xlabel="tokens trained on (0: pruned, not tuned)")
        axis.set_title(regime)
        log_labels(axis.yaxis, [*part[list(columns)].to_numpy().ravel(), *dense.values()])
        axis.xaxis.set_major_locator(MaxNLocator(4))
        axis.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes[0].set_ylabel("validation perplexity")
    figure.legend(handles=_recovery_handles(methods, dense), loc="outside right upper")
    return figure


_TEXTS = ({"ls": "-"}, {"ls": ":", "mfc": "white"})  # of the domain, of the other text
_LEVELS = ("--", (0, (1, 2)))


def _recovery_handles(methods: list[str], dense: Mapping[str, float]) -> list[Line2D]:
    handles = []
    for method in methods:
        tint, marker = style_for(method, methods, METHOD_STYLE)
        handles.append(Line2D([], [], color=tint, marker=marker, ms=4.5, label=method))
    for name, how in zip(dense, _TEXTS, strict=True):
        handles.append(
            Line2D([], [], color="#555555", marker="o", ms=4.5, label=f"on {name}", **how)
        )
    for name, line in zip(dense, _LEVELS, strict=True):
        handles.append(Line2D([], [], color="black", lw=1, ls=line, label=f"dense on {name}"))
    mark = {"color": "white", "ls": "", "mec": "black"}
    handles.append(Line2D([], [], marker="o", ms=9, label="best checkpoint", **mark))
    handles.append(Line2D([], [], marker="*", ms=12, label="dense level reached", **mark))
    return handles


@draws_frame(names="domain variant", numbers="accuracy chance items", maybe="low high")
def answer_dots(answers: pd.DataFrame, *, caption: str = "") -> Figure:
    """Accuracy with 95 % intervals, per domain and variant, beside chance.

    Parameters
    ----------
    answers : pandas.DataFrame
        Columns ``domain, variant, accuracy, low, high, chance, items``.
    """
    return _answer_rows(
        answers,
        "accuracy",
        label="accuracy in % (95 % Wilson interval)",
        caption=caption,
        title="Does the model still answer its domain's questions?",
    )


@draws_frame(names="domain variant", numbers="difference items", maybe="low high")
def answer_differences(differences: pd.DataFrame, *, caption: str = "") -> Figure:
    """Accuracy minus the dense model's on the same questions, with paired 95 % intervals.

    Parameters
    ----------
    differences : pandas.DataFrame
        Columns ``domain, variant, difference, low, high, items``.
    """
    return _answer_rows(
        differences,
        "difference",
        label="accuracy − dense, percentage points (paired 95 % interval)",
        caption=caption,
        title="Is the change more than luck?",
    )


def _answer_rows(
    table: pd.DataFrame, column: str, *, label: str, caption: str, title: str
) -> Figure:
    """Dots with intervals, domains below each other; chance or zero is a dashed line."""
    domains, variants = (list(table[name].unique()) for name in ("domain", "variant"))
    height = 1.3 + 0.24 * (len(variants) + 1) * len(domains)
    figure = new_figure(7.0, height, caption, title)
    axis = figure.subplots()
    tops = np.arange(len(domains)) * (len(variants) + 1.0)
    for place, variant in enumerate(variants):
        rows = table[table["variant"] == variant].set_index("domain").reindex(domains)
        tint, marker = style_for(variant, variants, VARIANT_STYLE)
        look = {"fmt": marker, "color": tint, "ms": 5, "capsize": 2, "label": variant}
        lengths = spread(rows[column], rows["low"], rows["high"])
        axis.errorbar(rows[column], tops + place, xerr=lengths, **look)
    facts = table.groupby("domain").first().loc[domains]
    if column == "accuracy":
        ends = (tops - 0.6, tops + len(variants) - 0.4)
        axis.vlines(facts["chance"], *ends, color="black", ls="--", lw=1, label="chance")
    else:
        axis.axvline(0, color="black", ls="--", lw=1)
    names = [f"{domain}\nn = {count}" for domain, count in facts["items"].items()]
    axis.set_yticks(tops + (len(variants) - 1) / 2, names)
    axis.set_ylim(tops[-1] + len(variants), -1)
    axis.xaxis.set_major_formatter(PercentFormatter(1, 0, symbol=""))
    axis.set_xlabel(label)
    side_legend(figure)
    return figure


@draws_frame(names="domain variant", numbers="perplexity_ratio difference")
def perplexity_and_accuracy(table: pd.DataFrame, *, caption: str = "") -> Figure:
    """Each domain's way from dense over pruned to recovered, perplexity against accuracy.

    Parameters
    ----------
    table : pandas.DataFrame
        Columns ``domain, variant, perplexity_ratio`` (to dense), ``difference`` (of accuracy to
        dense). If perplexity recovered while accuracy fell (the question behind table 4 of
        Mini-GPTs), the last points would lie at the left, below zero.
    """
    figure = new_figure(6.4, 4.0, caption, "Does accuracy follow perplexity back?")
    axis = figure.subplots()
    domains, variants = (list(table[name].unique()) for name in ("domain", "variant"))
    markers = {name: style_for(name, variants, VARIANT_STYLE)[1] for name in variants}
    for domain in domains:
        rows, tint = table[table["domain"] == domain], colour(domain, domains)
        places = rows[["perplexity_ratio", "difference"]].to_numpy()
        axis.plot(*places[:-1].T, color=tint, lw=0.8, alpha=0.6)
        for start, end in pairwise(places[-2:]):  # the way back is what the question is about
            axis.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": tint, "lw": 1.6})
        for place, variant in zip(places, rows["variant"], strict=True):
            axis.plot(*place, color=tint, ms=6, marker=markers[variant])
    axis.margins(x=0.14, y=0.1)  # for the names
    _name_ends(axis, table.groupby("domain", sort=False).last())
    axis.axhline(0, color="black", lw=0.8)
    axis.axvline(1, color="black", lw=0.8)
    axis.set(
        xscale="log", xlabel="test perplexity ÷ dense", ylabel="accuracy − dense, percentage points"
    )
    log_labels(axis.xaxis, [1, *table["perplexity_ratio"]])
    axis.yaxis.set_major_formatter(PercentFormatter(1, 0, symbol=""))
    grey = {"color": "#555555", "ls": ""}
    handles = [Line2D([], [], marker=each, label=name, **grey) for name, each in markers.items()]
    figure.legend(handles=handles, loc="outside right upper")
    return figure


def _name_ends(axis, ends: pd.DataFrame) -> None:
    """Write each domain left of its last point (lines come from the right), off the nearest one."""
    places = ends[["perplexity_ratio", "difference"]].to_numpy()
    apart = places / np.maximum(np.ptp(places, axis=0), 1e-9)
    for domain, place, own in zip(ends.index, places, apart, strict=True):
        distances = np.linalg.norm(apart - own, axis=1)
        distances[distances == 0] = np.inf
        up = own[1] >= apart[distances.argmin(), 1]
        where = {"xytext": (-6, 3 if up else -3), "textcoords": "offset points"}
        axis.annotate(domain, place, ha="right", va="bottom" if up else "top", fontsize=8, **where)


_STEPS = (1.02, 1.05, 1.1, 1.2, 1.5, 2, 3, 5, 10)  # of the colour bar


@draws_frame(
    names="cut text",
    numbers="perplexity difference",
    maybe="difference_low difference_high",
    flags="recovered",
)
def domain_heatmap(matrix: pd.DataFrame, *, caption: str = "") -> Figure:
    """Perplexity of every pruned model on every text, coloured by its ratio to the text's own.

    Parameters
    ----------
    matrix : pandas.DataFrame
        From `domain_matrix`.
    """
    states, texts = sorted(matrix["recovered"].unique()), list(matrix["text"].unique())
    cuts = sorted(matrix["cut"].unique(), key=lambda cut: cut not in texts)  # controls below
    width, height = 3.2 + 0.85 * len(texts), (0.7 + 0.42 * len(cuts)) * len(states) + 0.9
    title = "Is a model pruned for a domain better there?"
    figure = new_figure(width, height, caption, title)
    axes = figure.subplots(len(states), 1, sharex=True, squeeze=False).ravel()
    foreign = matrix[matrix["cut"].isin(texts) & (matrix["cut"] != matrix["text"])]
    # the scale is that of the domains' models: beside random pruning they would all look white
    limit = max(0.05, float(np.quantile(foreign["difference"].abs(), 0.8)))
    for axis, state in zip(axes, states, strict=True):
        rows = matrix[matrix["recovered"] == state].pivot(index="cut", columns="text")
        _domain_panel(axis, rows.loc[cuts], texts, limit)
        axis.set_title("recovered" if state else "without recovery")
    axes[-1].set_xlabel("held-out text")
    return figure


def _domain_panel(axis: Axes, rows: pd.DataFrame, texts: list[str], limit: float) -> None:
    """Cells ``[cut, text]`` of one state; the text's own model is framed."""
    gaps = rows["difference"][texts]
    sure = rows["difference_low"][texts] * rows["difference_high"][texts] > 0
    sure |= gaps == 0  # the text's own model
    words = rows["perplexity"][texts].map(short_number, form="#.3g")
    words += "\n×" + np.exp(gaps).map(short_number, form="#.3g")
    bar = {"label": "perplexity ÷ own model's", "extend": "both"}
    scale = {"cmap": "PuOr_r", "vmin": -limit, "vmax": limit, "cbar_kws": bar}
    heat(axis, gaps, words.where(sure, words.map("({})".format)), 7, **scale)
    for place, text in enumerate(texts):
        corner = (place, list(gaps.index).index(text))
        axis.add_patch(Rectangle(corner, 1, 1, fill=False, lw=1.6, clip_on=False, zorder=3))
    if len(gaps) > len(texts):  # the domains' models above, the controls below
        axis.axhline(len(texts), color="white", lw=4)
    axis.set_ylabel("pruned for")
    axis.tick_params(axis="x", rotation=30)
    axis.tick_params(axis="y", rotation=0)
    step = next(step for step in _STEPS if 2.5 * np.log(step) >= limit or step == _STEPS[-1])
    marks = [ratio for ratio in step ** np.arange(-2.0, 3) if abs(np.log(ratio)) <= limit]
    ticks = axis.collections[0].colorbar.ax.yaxis
    ticks.set_ticks(np.log(marks), [f"×{ratio:.3g}" for ratio in marks])
