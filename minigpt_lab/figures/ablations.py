"""SlimGPT in parts: one layer, one layer at a time, allocations, variants, calibration."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from .axes import (
    layer_ticks,
    line_with_range,
    log_labels,
    percent,
    row_labels,
    short_number,
    side_legend,
    value_labels,
)
from .frames import draws_frame
from .style import new_figure, style_for, text_style

_COMPENSATED = {  # line; marker filled or hollow
    True: ("-", "compensated", "#333333"),
    False: ("--", "not compensated", "white"),
}
_CHOICES = {"SlimGPT": ("#0072B2", "o"), "random": ("#7F7F7F", "s")}
_ALLOCATIONS = {  # colour, marker: blues and greens grow with depth, warm colours fall
    "log-increase": ("#0072B2", "o"),
    "linear-increase": ("#009E73", "^"),
    "uniform": ("#000000", "s"),
    "log-decrease": ("#E69F00", "v"),
    "linear-decrease": ("#D55E00", "D"),
    "search": ("#CC79A7", "P"),
}


@draws_frame(names="site choice", numbers="units share loss", flags="compensated")
def layer_losses(losses: pd.DataFrame, *, caption: str = "") -> Figure:
    """Loss of one layer's projections against the share of its units that is removed.

    Parameters
    ----------
    losses : pandas.DataFrame
        From `minigpt_lab.studies.layer_losses`: columns ``site, units, share, choice, compensated,
        loss``; several draws are their mean, in their range.
    caption : str
        Model, layer, calibration.
    """
    sites = losses.groupby("site", sort=False)["units"].first()
    figure = new_figure(8.2, 3.5, caption, "What helps more: the choice, or compensation?")
    room = [min(max(units, 4), 8) for units in sites]  # a few heads make a few points
    shape = {"sharey": True, "squeeze": False, "width_ratios": room}
    axes = figure.subplots(1, len(sites), **shape).ravel()
    for axis, (site, units) in zip(axes, sites.items(), strict=True):
        part = losses[losses["site"] == site]
        for (choice, compensated), rows in part.groupby(["choice", "compensated"], sort=False):
            (tint, marker), (line, words, _) = _CHOICES[choice], _COMPENSATED[compensated]
            look = {"color": tint, "marker": marker, "mfc": tint if compensated else "white"}
            look |= {"ls": line, "ms": 5, "lw": 1.2, "label": f"{choice}, {words}"}
            line_with_range(axis, rows.groupby("share")["loss"], middle="mean", **look)
        axis.set_yscale("log")
        axis.set_title(f"{site}: {units:,} units")
        axis.set(xlabel="share of units removed", xlim=(0, 1), xticks=[0.25, 0.5, 0.75])
        axis.xaxis.set_major_formatter(percent)
    log_labels(axes[0].yaxis, losses["loss"])
    axes[0].yaxis.set_major_formatter(FuncFormatter(percent))
    axes[0].set_ylabel("squared error ÷ squared output")
    side_legend(figure, axes[0])
    return figure


@draws_frame(names="text", numbers="layer ratio perplexity_ratio")
def one_layer_curves(table: pd.DataFrame, *, caption: str = "") -> Figure:
    """Perplexity after a single layer was pruned, against its depth: a line per ratio.

    Parameters
    ----------
    table : pandas.DataFrame
        From `minigpt_lab.studies.one_layer_at_a_time`: columns ``layer, ratio, text,
        perplexity_ratio``.
    caption : str
        Model, calibration, protocol.
    """
    texts, ratios = list(table["text"].unique()), sorted(table["ratio"].unique())
    title = "What does one layer cost, by its depth?"
    figure = new_figure(3.6 * len(texts) + 2.6, 3.4, caption, title)
    axes = figure.subplots(1, len(texts), sharey=True, squeeze=False).ravel()
    names = {ratio: f"{percent(ratio)} of the layer" for ratio in ratios}
    for axis, text in zip(axes, texts, strict=True):
        part = table[table["text"] == text].sort_values("layer")
        for ratio, name in names.items():
            rows = part[part["ratio"] == ratio]
            tint, marker = style_for(name, list(names.values()))
            look = {"color": tint, "marker": marker, "ms": 5, "lw": 1.2, "label": name}
            axis.plot(rows["layer"], rows["perplexity_ratio"], **look)
        axis.axhline(1, color="black", ls="--", lw=1, label="dense")
        axis.set_yscale("log")
        axis.set_title(text)
        axis.set_xlabel("the only layer that is pruned")
        axis.set_xticks(sorted(table["layer"].unique()))
    log_labels(axes[0].yaxis, [1, *table["perplexity_ratio"]])
    axes[0].set_ylabel("test perplexity ÷ dense")
    side_legend(figure, axes[0], upwards=True)
    return figure


@draws_frame(names="variant site", numbers="layer units removed cost", maybe="error")
def layer_budgets(layers: pd.DataFrame, *, caption: str = "") -> Figure:
    """Share removed of every layer under several allocations, and the error of its FFN.

    Parameters
    ----------
    layers : pandas.DataFrame
        From `minigpt_lab.studies.slimgpt_variants`: columns ``variant`` (the allocation's name),
        ``site, layer, units, removed, cost, error``.
    caption : str
        Model, calibration, ratio.
    """
    names = list(layers["variant"].unique())
    counts = layers[["removed", "units"]].mul(layers["cost"], axis=0)
    counts = counts.groupby([layers["variant"], layers["layer"]], sort=False).sum()
    removed = counts["removed"] / counts["units"]
    site = "ffn" if (layers["site"] == "ffn").any() else layers["site"].iloc[0]
    errors = layers[layers["site"] == site].set_index(["variant", "layer"])["error"]
    figure = new_figure(8.2, 4.8, caption, "Where does each allocation prune?")
    above, below = figure.subplots(2, 1, sharex=True)
    for name in names:
        tint, marker = style_for(name, names, _ALLOCATIONS)
        look = {"color": tint, "marker": marker, "ms": 4, "lw": 1.2, "label": name}
        for axis, values in ((above, removed.loc[name]), (below, errors.loc[name])):
            axis.plot(values.index, values, **look)
            axis.yaxis.set_major_formatter(percent)
    above.set(ylim=(0, 1), ylabel="share removed of the\nlayer's prunable parameters")
    below.set(xlabel="layer", ylabel=f"squared error of\nits {site} ÷ output")
    below.set_ylim(bottom=0)
    layer_ticks(below, int(layers["layer"].max()) + 1, 16)
    side_legend(figure, above)
    return figure


@draws_frame(names="variant text", numbers="perplexity", maybe="low high", flags="compensated")
def variant_dots(table: pd.DataFrame, *, caption: str = "", title: str = "") -> Figure:
    """Perplexity of variants with its interval, a panel per text; the dense model is a line.

    Parameters
    ----------
    table : pandas.DataFrame
        From `minigpt_lab.studies.slimgpt_variants`: columns ``variant, compensated, text,
        perplexity, low, high``. A variant that is not compensated is hollow.
    caption : str
        Model, calibration, protocol.
    title : str
        The question.
    """
    dense, pruned = table[table["variant"] == "dense"], table[table["variant"] != "dense"]
    texts, variants = (list(pruned[name].unique()) for name in ("text", "variant"))
    figure = new_figure(3.1 * len(texts) + 2.2, 1.3 + 0.34 * len(variants), caption, title)
    axes = figure.subplots(1, len(texts), sharey=True, squeeze=False).ravel()
    for axis, text in zip(axes, texts, strict=True):
        rows = pruned[pruned["text"] == text].set_index("variant").loc[variants]
        level = dense.loc[dense["text"] == text, "perplexity"].iloc[0]
        tint, marker = text_style(text, texts)
        for place, row in enumerate(rows.itertuples()):
            if np.isfinite(row.low):
                axis.plot([row.low, row.high], [place, place], color=tint, lw=1.2)
            fill = tint if row.compensated else "white"
            axis.plot(row.perplexity, place, marker, color=tint, mfc=fill, ms=6, zorder=4)
        value_labels(axis, rows["perplexity"], map(short_number, rows["perplexity"]))
        axis.axvline(level, color="black", ls="--", lw=1)
        axis.set(xscale="log", xlabel="test perplexity (95 % interval)")
        log_labels(axis.xaxis, [level, *rows[["perplexity", "low", "high"]].to_numpy().ravel()])
        axis.set_title(f"{text} (dense {short_number(level)})")
        row_labels(axis, variants)
    if not pruned["compensated"].all():
        look = {"marker": "o", "ls": "", "color": "#333333", "ms": 6}
        handles = [
            Line2D([], [], mfc=fill, label=words, **look)
            for _, words, fill in _COMPENSATED.values()
        ]
        figure.legend(handles=handles, loc="outside right upper")
    return figure


@draws_frame(names="setting text", numbers="value perplexity dense")
def calibration_settings(table: pd.DataFrame, *, caption: str = "") -> Figure:
    """Perplexity against the amount of calibration text and the length of its windows.

    Parameters
    ----------
    table : pandas.DataFrame
        Columns ``setting`` (one panel each, its name on the axis), ``value, text, perplexity,
        dense``.
    caption : str
        Model, ratio, protocol.
    """
    settings, texts = (list(table[name].unique()) for name in ("setting", "text"))
    title = "How much calibration text does it take?"
    figure = new_figure(3.1 * len(settings) + 2.0, 3.4, caption, title)
    axes = figure.subplots(1, len(settings), sharey=True, squeeze=False).ravel()
    for axis, setting in zip(axes, settings, strict=True):
        part = table[table["setting"] == setting].sort_values("value")
        for text in texts:
            rows, (tint, marker) = part[part["text"] == text], text_style(text, texts)
            look = {"color": tint, "marker": marker, "ms": 5, "lw": 1.2, "label": text}
            axis.plot(rows["value"], rows["perplexity"], **look)
            axis.axhline(rows["dense"].iloc[0], color=tint, ls="--", lw=1, label=f"{text}, dense")
        values = part["value"].unique()
        axis.set_xscale("log", base=2)
        axis.set_xticks(values, [f"{value:,.0f}" for value in values])
        axis.minorticks_off()
        axis.margins(x=0.08 if len(values) > 1 else None)
        axis.set(yscale="log", xlabel=setting)
    log_labels(axes[0].yaxis, [*table["perplexity"], *table["dense"]])
    axes[0].set_ylabel("test perplexity")
    side_legend(figure, axes[0])
    return figure
