"""Recovery, multiple choice, and pruned models on the texts of other domains."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import cycle

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter, StrMethodFormatter

from .axes import (
    group_lines,
    heat,
    key,
    log_labels,
    panel_row,
    short_number,
    side_legend,
    spread,
    two_way_keys,
)
from .frames import draws_frame
from .style import VARIANT_STYLE, Style, looks, new_figure, with_note

#: A colour per way to prune, darker where a teacher has a part in it; a marker per loss.
_LOSSES = {"label": "^", "kl": "v", "mix": "D"}
_PRUNERS = {
    "contextual": ("#E69F00", "#8C5A00", "#C27800"),
    "slimgpt": ("#56B4E9", "#003F66", "#0072B2"),
}
_TRAINING: dict[str, Style] = {
    f"{pruner}, {loss}": (tint, marker)
    for pruner, tints in _PRUNERS.items()
    for tint, (loss, marker) in zip(tints, _LOSSES.items(), strict=True)
}
_TEXTS = {  # of the domain, of the other text: column, line and marker, line of the dense level
    "perplexity": ({"ls": "-"}, "--"),
    "other_perplexity": ({"ls": ":", "mfc": "white"}, (0, (1, 2))),
}


@draws_frame(names="regime method", numbers="tokens perplexity other_perplexity")
def recovery_curves(
    histories: pd.DataFrame,
    *,
    dense: Mapping[str, float],
    tuned: Mapping[str, float] | None = None,
    caption: str = "",
) -> Figure:
    """Held-out perplexity against tokens trained on, a panel per regime, a colour per method.

    Filled markers are of the domain, hollow ones of the other text. A ring marks the best
    checkpoint, chosen on the validation text that is drawn.

    Parameters
    ----------
    histories : pandas.DataFrame
        Columns ``regime, method, tokens, perplexity, other_perplexity``, as `recover` returns them.
        Several rows at one point (seeds) are dots, and their mean is the line.
    dense : mapping
        Name of the domain and of the other one to the dense model's perplexity, in this order.
    tuned : mapping, optional
        The same of the dense model fine-tuned on the domain.
    caption : str
        Model, text, protocol.
    """
    question = "Does a short fine-tune bring the model back, and what does it forget?"
    caption = with_note(caption, "each panel has its own scale")
    figure, panels = panel_row(histories, "regime", caption, question, size=(3.6, 4.0))
    styles = looks(histories["method"], _TRAINING)
    own_level = next(iter(dense.values()))
    for axis, _, part in panels:
        for column, (look, _) in _TEXTS.items():
            curves = group_lines(axis, part, "tokens", column, styles, by="method", **look)
            if column == "perplexity":
                _mark_curves(axis, curves, styles, own_level)
        for (name, level), (_, line) in zip(dense.items(), _TEXTS.values(), strict=True):
            axis.axhline(level, color="black", lw=1, ls=line, label=f"dense on {name}")
            if tuned is not None:
                label = f"dense, fine-tuned, on {name}"
                axis.axhline(tuned[name], color="tab:green", lw=1, ls=line, label=label)
        axis.set(yscale="log", xlabel="tokens trained on (0: pruned, not tuned)")
        levels = [*dense.values(), *(tuned or {}).values()]
        log_labels(axis.yaxis, [*part[[*_TEXTS]].to_numpy().ravel(), *levels])
        axis.xaxis.set_major_locator(MaxNLocator(4))
        axis.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    figure.axes[0].set_ylabel("validation perplexity")
    lines = (look for look, _ in _TEXTS.values())
    keys = [key(f"on {name}", **look) for name, look in zip(dense, lines, strict=True)]
    mark = {"color": "white", "mec": "black"}
    keys.append(key("best checkpoint", ms=9, **mark))
    keys.append(key("dense level reached", marker="*", ms=12, **mark))
    side_legend(figure, *keys)
    return figure


def _mark_curves(axis: Axes, curves: dict[str, pd.DataFrame], styles: dict, level: float) -> None:
    """A ring around the best point of each curve, a star where it reaches the dense level."""
    for name, curve in curves.items():
        tint, points = styles[name]["color"], curve["perplexity"]
        axis.plot(points.idxmin(), points.min(), "o", ms=11, mfc="none", mec=tint, mew=1.4)
        reached = points[points <= level].head(1)
        axis.plot(reached.index, reached, "*", ms=15, color=tint, mec="black")


@draws_frame(names="text variant", numbers="perplexity", parts="variant")
def restore_or_adapt(table: pd.DataFrame, *, domain: str, other: str, caption: str = "") -> Figure:
    """Perplexity of the domain against that of another text, relative to the dense model's.

    A line leads from each pruned model (``"mild, slimgpt"``) to what a loss made of it
    (``"mild, slimgpt, kl"``, ``"mild, slimgpt, mix, general"``).

    Parameters
    ----------
    table : pandas.DataFrame
        Columns ``text, variant, perplexity``; the variants include ``"dense"``.
    domain, other : str
        Texts of the two axes.
    caption : str
        Model, text, protocol.
    """
    title = "Does training restore the dense model, or adapt to the domain?"
    figure = new_figure(8.4, 5.2, caption, title)
    axis = figure.subplots()
    places = table.pivot(index="variant", columns="text", values="perplexity")
    places = (places / places.loc["dense"])[[str(domain), str(other)]]
    axis.plot(1, 1, "*", color="black", ms=13)
    keys = [key("dense", color="black", marker="*", ms=11)]
    tuned = [name for name in places.index if name.startswith("dense, ")]
    for name in tuned:
        axis.plot(*places.loc[name], "P", color="tab:green", ms=9)
        keys.append(key("dense, fine-tuned", color="tab:green", marker="P", ms=8))
    trained = [name for name in places.index if name.count(", ") >= 2]
    styles = looks(sorted({name.split(", ", 1)[1] for name in trained}), _TRAINING)
    regimes = dict(zip(dict.fromkeys(n.split(", ")[0] for n in trained), cycle(["-", "--", ":"])))
    for name in trained:
        regime, how = name.split(", ", 1)
        before, look = places.loc[", ".join(name.split(", ")[:2])], styles[how]
        line = {"color": look["color"], "lw": 1.2, "ls": regimes[regime]}
        axis.plot(*zip(before, places.loc[name], strict=True), **line)
        axis.plot(*before, "o", color=look["color"], mfc="white")
        axis.plot(*places.loc[name], look["marker"], color=look["color"], ms=8)
    keys += [key(name, **look) for name, look in styles.items()]
    keys.append(key("pruned, not trained", color="gray", mfc="white"))
    keys += [key(name, color="gray", ls=line) for name, line in regimes.items()]
    for line in (axis.axvline, axis.axhline):
        line(1, color="black", lw=0.8, ls="--", zorder=0)
    axis.set(xscale="log", yscale="log")
    axis.set_xlabel(f"perplexity on {domain} / dense")
    axis.set_ylabel(f"perplexity on {other} / dense")
    log_labels(axis.xaxis, places[str(domain)], words="× {x:g}")
    log_labels(axis.yaxis, places[str(other)], words="× {x:g}")
    side_legend(figure, *keys)
    return figure


@draws_frame(names="domain variant", numbers="accuracy chance items low high")
def answer_dots(answers: pd.DataFrame, *, caption: str = "") -> Figure:
    """Accuracy with 95 % intervals, per domain and variant, beside chance.

    Parameters
    ----------
    answers : pandas.DataFrame
        Columns ``domain, variant, accuracy, low, high, chance, items``.
    """
    title = "Does the model still answer its domain's questions?"
    label = "accuracy in % (95 % Wilson interval)"
    return _answer_rows(answers, "accuracy", answers["chance"], label, caption, title)


@draws_frame(names="domain variant", numbers="difference items low high")
def answer_differences(differences: pd.DataFrame, *, caption: str = "") -> Figure:
    """Accuracy minus the dense model's on the same questions, with paired 95 % intervals.

    Parameters
    ----------
    differences : pandas.DataFrame
        Columns ``domain, variant, difference, low, high, items``.
    """
    title = "Is the change more than luck?"
    label = "accuracy − dense, percentage points (paired 95 % interval)"
    return _answer_rows(differences, "difference", 0.0, label, caption, title)


def _answer_rows(
    table: pd.DataFrame, column: str, level, label: str, caption: str, title: str
) -> Figure:
    """Dots with intervals, domains below each other; chance or zero is a dashed line."""
    styles = looks(table["variant"], VARIANT_STYLE)
    facts = table.assign(level=level).groupby("domain", sort=False).first()
    height = 1.3 + 0.24 * (len(styles) + 1) * len(facts)
    figure = new_figure(7.0, height, caption, title)
    axis = figure.subplots()
    tops = np.arange(len(facts)) * (len(styles) + 1.0)
    for place, (variant, look) in enumerate(styles.items()):
        rows = table[table["variant"] == variant].set_index("domain").reindex(facts.index)
        lengths = spread(rows, column)
        dots = {"ls": "", "ms": 5, "capsize": 2, "label": variant, **look}
        axis.errorbar(rows[column], tops + place, xerr=lengths, **dots)
    ends = (tops - 0.6, tops + len(styles) - 0.4)
    name = "chance" if column == "accuracy" else "dense"
    axis.vlines(facts["level"], *ends, color="black", ls="--", lw=1, label=name)
    names = [f"{domain}\nn = {count}" for domain, count in facts["items"].items()]
    axis.set_yticks(tops + (len(styles) - 1) / 2, names)
    axis.set_ylim(tops[-1] + len(styles), -1)
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
    domains, variants = looks(table["domain"]), looks(table["variant"], VARIANT_STYLE)
    for domain, rows in table.groupby("domain", sort=False):
        tint, places = domains[domain]["color"], rows[["perplexity_ratio", "difference"]].to_numpy()
        axis.plot(*places.T, color=tint, lw=0.8, alpha=0.6)
        if len(places) > 1:  # the way back is what the question is about
            arrow = {"arrowstyle": "->", "color": tint, "lw": 1.6}
            axis.annotate("", places[-1], places[-2], arrowprops=arrow)
        for place, variant in zip(places, rows["variant"], strict=True):
            axis.plot(*place, ms=6, **variants[variant] | {"color": tint})
    axis.axhline(0, color="black", lw=0.8)
    axis.axvline(1, color="black", lw=0.8)
    axis.margins(0.1)
    axis.set(
        xscale="log", xlabel="test perplexity ÷ dense", ylabel="accuracy − dense, percentage points"
    )
    log_labels(axis.xaxis, [1, *table["perplexity_ratio"]])
    axis.yaxis.set_major_formatter(PercentFormatter(1, 0, symbol=""))
    side_legend(figure, *two_way_keys(domains, variants))
    return figure


@draws_frame(
    names="cut text", numbers="perplexity difference difference_low difference_high recovered"
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
    bar = {
        "label": "perplexity ÷ own model's",
        "extend": "both",
        "format": lambda gap, _: f"×{np.exp(gap):.3g}",
        "ticks": MaxNLocator(5),
    }
    scale = {"cmap": "PuOr_r", "vmin": -limit, "vmax": limit, "cbar_kws": bar}
    heat(axis, gaps, words.where(sure, words.map("({})".format)), 7, **scale)
    for place, text in enumerate(texts):
        corner = (place, list(gaps.index).index(text))
        axis.add_patch(Rectangle(corner, 1, 1, fill=False, lw=1.6, clip_on=False, zorder=3))
    if len(gaps) > len(texts):  # the domains' models above, the controls below
        axis.axhline(len(texts), color="white", lw=4)
    axis.set_ylabel("pruned for")
