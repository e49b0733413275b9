"""What recovery, questions and foreign domains say about a cut: a frame in, a figure out."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, PercentFormatter

from .style import METHOD_STYLE, VARIANT_STYLE, colour, log_ticks, new_figure, styled


@styled
def recovery_curves(
    histories: pd.DataFrame, dense: Mapping[str, float], caption: str = ""
) -> Figure:
    """Held-out perplexity against tokens trained on, a panel per regime, a colour per method.

    Parameters
    ----------
    histories : pandas.DataFrame
        Columns ``regime, method, tokens, perplexity, other_perplexity``, as `recover` returns them.
    dense : mapping
        Name of the domain and of the other one to the dense model's perplexity, in this order.
    caption : str
        Model, text, protocol.
    """
    regimes, texts = list(dict.fromkeys(histories["regime"])), list(dense)
    columns = ("perplexity", "other_perplexity")
    question = "Does a short fine-tune bring the model back, and what does it forget?"
    figure = new_figure(3.6 * len(regimes) + 2, 4.0, caption, question)
    axes = figure.subplots(1, len(regimes), squeeze=False).ravel()
    for axis, regime in zip(axes, regimes, strict=True):
        part = histories[histories["regime"] == regime]
        for method, rows in part.groupby("method", sort=False):
            tint, marker = METHOD_STYLE[method]
            for column, line in zip(columns, ("-", ":"), strict=True):
                axis.plot(rows["tokens"], rows[column], color=tint, marker=marker, ms=4, ls=line)
            met = rows[rows["perplexity"] <= dense[texts[0]]].head(1)
            axis.plot(met["tokens"], met["perplexity"], "*", ms=15, color=tint, mec="black")
        for level, line in zip(dense.values(), ("--", (0, (1, 2))), strict=True):
            axis.axhline(level, color="black", lw=1, ls=line)
        axis.set(yscale="log", xlabel="tokens trained on")
        axis.set_title(regime, fontsize=9, fontweight="normal")
        _log_labels(axis.yaxis, part[list(columns)].to_numpy().ravel(), dense.values())
        axis.xaxis.set_major_locator(MaxNLocator(4))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes[0].set_ylabel("validation perplexity (each panel its own scale)")
    methods = dict.fromkeys(histories["method"])
    handles = [
        Line2D([], [], color=METHOD_STYLE[m][0], marker=METHOD_STYLE[m][1], ms=4, label=m)
        for m in methods
    ]
    for name, line in zip(texts, ("-", ":"), strict=True):
        handles.append(Line2D([], [], color="#555555", ls=line, label=f"on {name}"))
    for name, line in zip(texts, ("--", (0, (1, 2))), strict=True):
        handles.append(Line2D([], [], color="black", lw=1, ls=line, label=f"dense on {name}"))
    handles.append(Line2D([], [], color="white", marker="*", mec="black", ms=12, ls="",
                          label="dense level reached"))  # fmt: skip
    figure.legend(handles=handles, loc="outside right upper", fontsize=8)
    return figure


def _log_labels(axis, values: np.ndarray, levels) -> None:
    """Readable numbers on a log axis, whether it spans a tenth of a decade or five."""
    values = np.array([*values[np.isfinite(values)], *levels])
    low, high = values.min(), values.max()
    if high > 10 * low:
        axis.set_ticks(*log_ticks(low / 1.2, high * 1.2))
    else:
        axis.set_major_locator(MaxNLocator(6))
        axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


@styled
def answer_dots(answers: pd.DataFrame, caption: str = "") -> Figure:
    """Accuracy with 95 % intervals, per domain and variant, beside chance.

    Parameters
    ----------
    answers : pandas.DataFrame
        Columns ``domain, variant, accuracy, low, high, chance, items``.
    """
    return _dots(
        answers, "accuracy", "accuracy (95 % Wilson interval)", caption,
        "Does the model still answer its domain's questions?", reference="chance",
    )  # fmt: skip


@styled
def answer_differences(differences: pd.DataFrame, caption: str = "") -> Figure:
    """Accuracy minus the dense model's on the same questions, with paired 95 % intervals.

    Parameters
    ----------
    differences : pandas.DataFrame
        Columns ``domain, variant, difference, low, high, items``.
    """
    return _dots(
        differences, "difference", "accuracy − dense (paired 95 % interval)", caption,
        "Is the change more than luck?", reference=None,
    )  # fmt: skip


def _dots(table, value, label, caption, question, reference) -> Figure:
    domains = list(dict.fromkeys(table["domain"]))
    variants = list(dict.fromkeys(table["variant"]))
    height = 1.3 + 0.24 * (len(variants) + 1) * len(domains)
    figure = new_figure(7.0, height, caption, question)
    axis = figure.subplots()
    middles = np.arange(len(domains)) * (len(variants) + 1.0)
    for place, variant in enumerate(variants):
        rows = table[table["variant"] == variant].set_index("domain").reindex(domains)
        bounds = [rows[value] - rows["low"], rows["high"] - rows[value]]
        tint, marker = VARIANT_STYLE[variant]
        axis.errorbar(rows[value], middles + place, xerr=np.maximum(bounds, 0), fmt=marker,
                      color=tint, ms=5, capsize=2, label=variant)  # fmt: skip
    if reference:
        levels = table.groupby("domain")[reference].first()[domains]
        ends = (middles - 0.6, middles + len(variants) - 0.4)
        axis.vlines(levels, *ends, color="black", ls="--", lw=1, label=reference)
    else:
        axis.axvline(0, color="black", ls="--", lw=1)
    counts = table.groupby("domain")["items"].first()
    names = [f"{domain}\nn = {counts[domain]}" for domain in domains]
    axis.set_yticks(middles + (len(variants) - 1) / 2, names)
    axis.set_ylim(middles[-1] + len(variants), -1)
    axis.xaxis.set_major_formatter(PercentFormatter(1, 0))
    axis.set_xlabel(label)
    figure.legend(loc="outside right upper", fontsize=8)
    return figure


@styled
def perplexity_and_accuracy(table: pd.DataFrame, caption: str = "") -> Figure:
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
    domains = list(dict.fromkeys(table["domain"]))
    for domain in domains:
        rows, tint = table[table["domain"] == domain], colour(domain, domains)
        axis.plot(rows["perplexity_ratio"], rows["difference"], color=tint, lw=1, label=domain)
        for _, row in rows.iterrows():
            axis.plot(row["perplexity_ratio"], row["difference"], color=tint, ms=6,
                      marker=VARIANT_STYLE[row["variant"]][1])  # fmt: skip
    axis.axhline(0, color="black", lw=0.8)
    axis.axvline(1, color="black", lw=0.8)
    axis.set(xscale="log", xlabel="test perplexity ÷ dense", ylabel="accuracy − dense")
    _log_labels(axis.xaxis, table["perplexity_ratio"].to_numpy(), [1])
    axis.yaxis.set_major_formatter(PercentFormatter(1, 0))
    handles, _ = axis.get_legend_handles_labels()
    handles += [
        Line2D([], [], color="#555555", marker=VARIANT_STYLE[v][1], ls="", label=v)
        for v in dict.fromkeys(table["variant"])
    ]
    figure.legend(handles=handles, loc="outside right upper", fontsize=8)
    return figure


def _short(value: float) -> str:
    """Three digits, or all of a large number."""
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"


@styled
def domain_heatmap(matrix: pd.DataFrame, caption: str = "") -> Figure:
    """Perplexity of every cut on every text, coloured by its ratio to the text's own cut.

    Parameters
    ----------
    matrix : pandas.DataFrame
        From `domain_matrix`.
    """
    states = sorted(matrix["recovered"].unique())
    texts = list(dict.fromkeys(matrix["text"]))
    cuts = list(dict.fromkeys(matrix["cut"]))
    width, height = (1.6 + 0.95 * len(texts)) * len(states) + 1, 1.7 + 0.52 * len(cuts)
    figure = new_figure(width, height, caption, "Is a model cut for a domain better there?")
    axes = figure.subplots(1, len(states), sharey=True, squeeze=False).ravel()
    foreign = matrix[matrix["cut"].isin(texts) & (matrix["cut"] != matrix["text"])]
    # the scale is that of the domains' cuts: beside the smallest weights they would all look white
    reach = max(0.05, float(np.quantile(foreign["difference"].abs(), 0.8)))
    norm = TwoSlopeNorm(0, -reach, reach)
    for axis, state in zip(axes, states, strict=True):
        part = matrix[matrix["recovered"] == state]
        wide = part.pivot(index="cut", columns="text").loc[cuts]
        gaps, values = wide["difference"][texts], wide["perplexity"][texts]
        sure = wide["difference_low"][texts] * wide["difference_high"][texts] > 0
        sure |= gaps == 0  # the text's own cut
        words = values.map(_short) + "\n×" + np.exp(gaps).map(_short)
        sns.heatmap(gaps, annot=words.where(sure, words.map("({})".format)), fmt="", norm=norm,
                    cmap="PuOr_r", ax=axis, cbar=axis is axes[-1], annot_kws={"fontsize": 7},
                    cbar_kws={"label": "perplexity ÷ that of the text's own cut"})  # fmt: skip
        for place, text in enumerate(texts):
            axis.add_patch(Rectangle((place, cuts.index(text)), 1, 1, fill=False, lw=1.6))
        axis.set(xlabel="held-out text", ylabel="cut for" if axis is axes[0] else "")
        axis.set_title("recovered" if state else "without recovery", fontsize=9,
                       fontweight="normal")  # fmt: skip
        axis.tick_params(axis="x", rotation=30)
        axis.tick_params(axis="y", rotation=0)
        axis.grid(False)
    scale = figure.axes[-1].yaxis
    scale.set_major_formatter(FuncFormatter(lambda value, _: f"×{np.exp(value):.2f}"))
    return figure
