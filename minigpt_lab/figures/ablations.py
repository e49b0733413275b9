"""SlimGPT taken apart: one layer, one layer at a time, schedules, calibration. Frames in."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from .frames import drawn
from .style import layer_ticks, log_labels, new_figure, percent, side_legend, style_for

_WAYS = {True: "-", False: "--"}  # the rest refitted, or as it was
_CHOICES = {"SlimGPT": ("#0072B2", "o"), "random": ("#7F7F7F", "s")}
_SCHEDULES = {  # colour, marker: blues and greens grow with depth, warm colours fall
    "log-increase": ("#0072B2", "o"),
    "linear-increase": ("#009E73", "^"),
    "uniform": ("#000000", "s"),
    "log-decrease": ("#E69F00", "v"),
    "linear-decrease": ("#D55E00", "D"),
    "search": ("#CC79A7", "P"),
}


@drawn(names="site choice", numbers="units share loss", flags="compensated")
def layer_losses(losses: pd.DataFrame, *, caption: str = "") -> Figure:
    """Loss of one layer's projections against the share of units that leaves.

    Parameters
    ----------
    losses : pandas.DataFrame
        From `minigpt_lab.studies.ablations.layer_losses`: columns ``site, units, share, choice,
        compensated, loss``; several draws are their mean, in their range.
    caption : str
        Model, layer, calibration.
    """
    sites = losses.groupby("site", sort=False)["units"].first()
    title = "What helps more: to choose well, or to make up for it?"
    figure = new_figure(8.2, 3.5, caption, title)
    room = [min(max(units, 4), 8) for units in sites]  # a few heads make a few points
    shape = {"sharey": True, "squeeze": False, "width_ratios": room}
    axes = figure.subplots(1, len(sites), **shape).ravel()
    for axis, (site, units) in zip(axes, sites.items(), strict=True):
        part = losses[losses["site"] == site]
        for (choice, refitted), rows in part.groupby(["choice", "compensated"], sort=False):
            tint, marker = _CHOICES[choice]
            found = rows.groupby("share")["loss"].agg(["mean", "min", "max"])
            axis.fill_between(found.index, found["min"], found["max"], color=tint, alpha=0.2, lw=0)
            label = f"{choice}, {'compensated' if refitted else 'not compensated'}"
            axis.plot(found.index, found["mean"], _WAYS[refitted], color=tint, marker=marker,
                      mfc=tint if refitted else "white", ms=5, lw=1.2, label=label)  # fmt: skip
        axis.set_yscale("log")
        axis.set_title(f"{site}: {units:,} units", fontsize=9, fontweight="normal")
        axis.set_xlabel("share of units that leave")
        axis.set(xlim=(0, 1), xticks=[0.25, 0.5, 0.75])
        axis.xaxis.set_major_formatter(percent)
    log_labels(axes[0].yaxis, losses["loss"])
    axes[0].yaxis.set_major_formatter(FuncFormatter(percent))
    axes[0].set_ylabel("squared error ÷ squared output")
    side_legend(figure, axes[0])
    return figure


@drawn(names="text", numbers="layer ratio perplexity_ratio")
def one_layer_curves(table: pd.DataFrame, *, caption: str = "") -> Figure:
    """Perplexity after a single layer was pruned, against its depth: a line per ratio.

    Parameters
    ----------
    table : pandas.DataFrame
        From `minigpt_lab.studies.ablations.one_layer_at_a_time`: columns ``layer, ratio, text,
        perplexity_ratio``.
    caption : str
        Model, calibration, protocol.
    """
    texts, ratios = list(dict.fromkeys(table["text"])), sorted(table["ratio"].unique())
    title = "What does one layer cost, by its depth?"
    figure = new_figure(3.6 * len(texts) + 2.6, 3.4, caption, title)
    axes = figure.subplots(1, len(texts), sharey=True, squeeze=False).ravel()
    names = [f"{percent(ratio)} of the layer" for ratio in ratios]
    for axis, text in zip(axes, texts, strict=True):
        for name, ratio in zip(names, ratios, strict=True):
            rows = table[(table["text"] == text) & (table["ratio"] == ratio)].sort_values("layer")
            tint, marker = style_for(name, names)
            axis.plot(rows["layer"], rows["perplexity_ratio"], color=tint, marker=marker, ms=5,
                      lw=1.2, label=name)  # fmt: skip
        axis.axhline(1, color="black", ls="--", lw=1, label="dense")
        axis.set_yscale("log")
        axis.set_title(text, fontsize=9, fontweight="normal")
        axis.set_xlabel("the only layer that is pruned")
        axis.set_xticks(sorted(table["layer"].unique()))
    log_labels(axes[0].yaxis, [1, *table["perplexity_ratio"]])
    axes[0].set_ylabel("test perplexity ÷ dense")
    side_legend(figure, axes[0], upwards=True)
    return figure


@drawn(names="variant site", numbers="layer units removed cost", maybe="error")
def layer_budgets(layers: pd.DataFrame, *, caption: str = "") -> Figure:
    """How much of every layer leaves under several allocations, and what its channels' cut costs.

    Parameters
    ----------
    layers : pandas.DataFrame
        From `minigpt_lab.studies.ablations.slimgpt_variants`: columns ``variant`` (the allocation's
        name), ``site, layer, units, removed, cost, error``.
    caption : str
        Model, calibration, ratio.
    """
    names = list(dict.fromkeys(layers["variant"]))
    sized = layers.assign(
        gone=layers["removed"] * layers["cost"], all=layers["units"] * layers["cost"]
    )
    sums = sized.groupby(["variant", "layer"], sort=False)[["gone", "all"]].sum()
    site = "ffn" if (layers["site"] == "ffn").any() else layers["site"].iloc[0]
    errors = layers[layers["site"] == site].set_index(["variant", "layer"])["error"]
    figure = new_figure(8.2, 4.8, caption, "Where does each allocation cut?")
    shares, costs = figure.subplots(2, 1, sharex=True)
    for name in names:
        tint, marker = style_for(name, names, _SCHEDULES)
        share = sums.loc[name, "gone"] / sums.loc[name, "all"]
        for axis, values in ((shares, share), (costs, errors.loc[name])):
            axis.plot(values.index, values, color=tint, marker=marker, ms=4, lw=1.2, label=name)
    layer_ticks(costs, int(layers["layer"].max()) + 1, 16)
    shares.set_ylim(0, 1)
    shares.set_ylabel("share of the layer's\nprunable parameters")
    costs.set_ylabel(f"squared error of\nits {site} ÷ output")
    costs.set_ylim(bottom=0)
    for axis in (shares, costs):
        axis.yaxis.set_major_formatter(percent)
    costs.set_xlabel("layer")
    side_legend(figure, shares)
    return figure


@drawn(names="variant text", numbers="perplexity", maybe="low high", flags="compensated")
def variant_dots(table: pd.DataFrame, *, caption: str = "", title: str = "") -> Figure:
    """Perplexity of variants with its interval, a panel per text; the dense model is a line.

    Parameters
    ----------
    table : pandas.DataFrame
        From `minigpt_lab.studies.ablations.slimgpt_variants`: columns ``variant, compensated, text,
        perplexity, low, high``. A cut that is not compensated is hollow.
    caption : str
        Model, calibration, protocol.
    title : str
        The question.
    """
    dense, cuts = table[table["variant"] == "dense"], table[table["variant"] != "dense"]
    texts, variants = (list(dict.fromkeys(cuts[name])) for name in ("text", "variant"))
    figure = new_figure(3.1 * len(texts) + 2.2, 1.3 + 0.34 * len(variants), caption, title)
    axes = figure.subplots(1, len(texts), sharey=True, squeeze=False).ravel()
    for axis, text in zip(axes, texts, strict=True):
        rows = cuts[cuts["text"] == text].set_index("variant").loc[variants]
        level = dense.loc[dense["text"] == text, "perplexity"].iloc[0]
        tint, marker = style_for(text.rsplit("/", 1)[0], [each.rsplit("/", 1)[0] for each in texts])
        for place, row in enumerate(rows.itertuples()):
            if np.isfinite(row.low):
                axis.plot([row.low, row.high], [place, place], color=tint, lw=1.2)
            fill = tint if row.compensated else "white"
            axis.plot(row.perplexity, place, marker, color=tint, mfc=fill, ms=6, zorder=4)
            axis.annotate(
                _number(row.perplexity), (row.perplexity, place), xytext=(0, 6), ha="center",
                textcoords="offset points", fontsize=7.5,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},  # not in the line
            )  # fmt: skip
        axis.axvline(level, color="black", ls="--", lw=1)
        axis.set_xscale("log")
        values = [level, *rows["perplexity"], *rows["low"], *rows["high"]]
        log_labels(axis.xaxis, values)
        axis.set_title(f"{text} (dense {_number(level)})", fontsize=9, fontweight="normal")
        axis.set_xlabel("test perplexity (95 % interval)")
        axis.set_yticks(range(len(variants)), variants)
        axis.set_ylim(len(variants) - 0.5, -0.8)
    if not cuts["compensated"].all():
        filled = {"compensated": "#333333", "not compensated": "white"}
        handles = [
            Line2D([], [], marker="o", ls="", color="#333333", mfc=fill, ms=6, label=label)
            for label, fill in filled.items()
        ]
        figure.legend(handles=handles, loc="outside right upper", fontsize=8)
    return figure


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


@drawn(names="setting text", numbers="value perplexity dense")
def calibration_settings(table: pd.DataFrame, *, caption: str = "") -> Figure:
    """Perplexity against how much text a cut was calibrated on and in what windows.

    Parameters
    ----------
    table : pandas.DataFrame
        Columns ``setting`` (one panel each, its name on the axis), ``value, text, perplexity,
        dense``.
    caption : str
        Model, ratio, protocol.
    """
    settings, texts = (list(dict.fromkeys(table[name])) for name in ("setting", "text"))
    domains = [text.rsplit("/", 1)[0] for text in texts]
    title = "How much calibration text does it take?"
    figure = new_figure(3.1 * len(settings) + 2.0, 3.4, caption, title)
    axes = figure.subplots(1, len(settings), sharey=True, squeeze=False).ravel()
    for axis, setting in zip(axes, settings, strict=True):
        part = table[table["setting"] == setting]
        for text, domain in zip(texts, domains, strict=True):
            rows = part[part["text"] == text].sort_values("value")
            tint, marker = style_for(domain, domains)
            axis.plot(rows["value"], rows["perplexity"], color=tint, marker=marker, ms=5, lw=1.2,
                      label=text)  # fmt: skip
            axis.axhline(rows["dense"].iloc[0], color=tint, ls="--", lw=1, label=f"{text}, dense")
        _powers(axis, sorted(part["value"].unique()))
        axis.set(yscale="log", xlabel=setting)
    log_labels(axes[0].yaxis, [*table["perplexity"], *table["dense"]])
    axes[0].set_ylabel("test perplexity")
    side_legend(figure, axes[0])
    return figure


def _powers(axis: Axes, values: list[float]) -> None:
    """The measured values along a log axis of base 2."""
    axis.set_xscale("log", base=2)
    axis.set_xticks(values, [f"{value:,.0f}" for value in values])
    axis.minorticks_off()
    if len(values) > 1:
        axis.margins(x=0.08)
