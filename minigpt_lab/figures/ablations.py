"""SlimGPT in parts: one layer, one layer at a time, allocations, variants, calibration."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from ..checks import Frame
from .axes import (
    dot_rows,
    group_lines,
    key,
    layer_ticks,
    log_labels,
    panel_row,
    percent,
    short_number,
    side_legend,
)
from .frames import draws_frame
from .style import Style, looks, new_figure

_CHOICES: dict[str, Style] = {"SlimGPT": ("#0072B2", "o"), "random": ("#7F7F7F", "s")}
_ALLOCATIONS: dict[str, Style] = {  # blues and greens grow with depth, warm colours fall
    "log-increase": ("#0072B2", "o"),
    "linear-increase": ("#009E73", "^"),
    "uniform": ("#000000", "s"),
    "log-decrease": ("#E69F00", "v"),
    "linear-decrease": ("#D55E00", "D"),
    "search": ("#CC79A7", "P"),
}


@draws_frame(names="site choice", numbers="units share loss compensated")
def layer_losses(losses: pd.DataFrame, *, caption: str = "") -> Figure:
    """Loss of one layer's projections against the share of its units that is removed.

    Parameters
    ----------
    losses : pandas.DataFrame
        From `minigpt_lab.studies.layer_losses`: columns ``site, units, share, choice, compensated,
        loss``; several rows at one share (seeds) are dots, and their mean is the line.
    caption : str
        Model, layer, calibration.
    """
    title = "What helps more: the choice, or compensation?"
    # few heads, few points
    room = [min(max(units, 4), 8) for units in losses.groupby("site", sort=False)["units"].first()]
    ways = {True: ", compensated", False: ", not compensated"}
    losses = losses.assign(way=losses["choice"] + losses["compensated"].map(ways))
    styles = {}
    for choice, look in looks(losses["choice"], _CHOICES).items():
        styles[choice + ways[True]] = look
        styles[choice + ways[False]] = look | {"ls": "--", "mfc": "white"}
    figure, panels = panel_row(
        losses, "site", caption, title, size=(3.0, 3.5), sharey=True, width_ratios=room
    )
    for axis, site, part in panels:
        group_lines(axis, part, "share", "loss", styles, by="way")
        axis.set_title(f"{site}: {part['units'].iloc[0]:,} units")
        axis.set(xlabel="share of units removed", xlim=(0, 1), xticks=[0.25, 0.5, 0.75])
        axis.xaxis.set_major_formatter(percent)
        axis.set_yscale("log")
    first = figure.axes[0]
    log_labels(first.yaxis, losses["loss"])
    first.yaxis.set_major_formatter(FuncFormatter(percent))
    first.set_ylabel("squared error ÷ squared output")
    side_legend(figure)
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
    title = "What does one layer cost, by its depth?"
    table = table.sort_values("ratio", ascending=False, kind="stable")  # as the lines lie
    table = table.assign(name=table["ratio"].map(percent) + " of the layer")
    figure, panels = panel_row(table, "text", caption, title, size=(3.6, 3.4), sharey=True)
    for axis, _, part in panels:
        group_lines(axis, part, "layer", "perplexity_ratio", looks(table["name"]), by="name")
        axis.axhline(1, color="black", ls="--", lw=1, label="dense")
        axis.set(yscale="log", xlabel="the only layer that is pruned")
        axis.set_xticks(sorted(table["layer"].unique()))
    log_labels(figure.axes[0].yaxis, [1, *table["perplexity_ratio"]])
    figure.axes[0].set_ylabel("test perplexity ÷ dense")
    side_legend(figure)
    return figure


@draws_frame(names="text", numbers="epoch loss")
def reconstruction_curve(table: pd.DataFrame, *, caption: str = "") -> Figure:
    """Loss of one reconstructed block, epoch by epoch, on calibration and on held-out text.

    Parameters
    ----------
    table : pandas.DataFrame
        From `minigpt_lab.studies.reconstruction_curve`: columns ``epoch, text, loss``; several
        rows of an epoch (samples) are dots.
    caption : str
        Model, layer, ratio, calibration.
    """
    figure = new_figure(7.2, 3.8, caption, "When does reconstruction overfit its text?")
    axis = figure.subplots()
    means = group_lines(axis, table, "epoch", "loss", looks(table["text"]), by="text", ms=3)
    for text, points in means.items():
        lowest = points["loss"].argmin()
        axis.plot(*points.iloc[lowest], "o", ms=10, mfc="none", mec="black", mew=1)
        if text == "held-out":
            axis.axvline(points["epoch"].iloc[lowest], color="gray", lw=0.8, ls="--", zorder=0)
    axis.set(xlabel="epoch (0: the closed form)", ylim=(0, None))
    axis.set_ylabel("squared error of the residual stream\n÷ each token's energy")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    side_legend(figure, key("lowest", color="black", mfc="none"))
    return figure


@draws_frame(names="variant site", numbers="layer units removed cost error")
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
    counts = layers[["removed", "units"]].mul(layers["cost"], axis=0)
    counts = counts.join(layers[["variant", "layer"]]).groupby(["variant", "layer"]).sum()
    shares = (counts["removed"] / counts["units"]).rename("share").reset_index()
    site = "ffn" if (layers["site"] == "ffn").any() else layers["site"].iloc[0]
    styles = looks(layers["variant"], _ALLOCATIONS)
    figure = new_figure(8.2, 4.8, caption, "Where does each allocation prune?")
    above, below = figure.subplots(2, 1, sharex=True)
    group_lines(above, shares, "layer", "share", styles, by="variant")
    group_lines(below, layers[layers["site"] == site], "layer", "error", styles, by="variant")
    above.set(ylim=(0, 1), ylabel="share removed of the\nlayer's prunable parameters")
    below.set(xlabel="layer", ylabel=f"squared error of\nits {site} ÷ output")
    below.set_ylim(bottom=0)
    for axis in (above, below):
        axis.yaxis.set_major_formatter(percent)
    layer_ticks(below, int(layers["layer"].max()) + 1, 16)
    side_legend(figure)
    return figure


@draws_frame(names="variant text", numbers="perplexity low high")
def variant_dots(
    table: pd.DataFrame, *, filled: str = "compensated", caption: str = "", title: str = ""
) -> Figure:
    """Perplexity of variants with its interval, a panel per text; the dense model is a line.

    Parameters
    ----------
    table : pandas.DataFrame
        From `minigpt_lab.studies.slimgpt_variants`: columns ``variant, compensated, text,
        perplexity, low, high``.
    filled : str
        Column of what a variant is or is not: those that are not are hollow.
    caption : str
        Model, calibration, protocol.
    title : str
        The question.
    """
    Frame(numbers=[filled])("table", table)
    dense, pruned = table[table["variant"] == "dense"], table[table["variant"] != "dense"]
    variants, styles = list(pruned["variant"].unique()), looks(pruned["text"])
    size = (3.1, 1.3 + 0.34 * len(variants))
    figure, panels = panel_row(pruned, "text", caption, title, size=size, sharey=True)
    columns = ("perplexity", "low", "high")
    for axis, text, rows in panels:
        level = dense.loc[dense["text"] == text, "perplexity"].iloc[0]
        rows = rows.set_index("variant").loc[variants]
        dot_rows(axis, rows, columns, short_number, filled=rows[filled], **styles[text])
        axis.axvline(level, color="black", ls="--", lw=1)
        axis.set(xscale="log", xlabel="test perplexity (95 % interval)")
        log_labels(axis.xaxis, [level, *rows[[*columns]].to_numpy().ravel()])
        axis.set_title(f"{text} (dense {short_number(level)})")
    if not pruned[filled].all():
        side_legend(figure, key(filled), key(f"not {filled}", mfc="white"))
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
    title = "How much calibration text does it take?"
    styles = looks(table["text"])
    figure, panels = panel_row(table, "setting", caption, title, size=(3.1, 3.4), sharey=True)
    for axis, setting, part in panels:
        group_lines(axis, part, "value", "perplexity", styles, by="text")
        for text, level in part.groupby("text", sort=False)["dense"].first().items():
            line = {"color": styles[text]["color"], "ls": "--", "lw": 1}
            axis.axhline(level, label=f"{text}, dense", **line)
        values = part["value"].unique()
        axis.set_xscale("log", base=2)
        axis.set_xticks(values, [f"{value:,.0f}" for value in values])
        axis.minorticks_off()
        axis.margins(x=0.08 if len(values) > 1 else None)
        axis.set(yscale="log", title="", xlabel=setting)
    log_labels(figure.axes[0].yaxis, [*table["perplexity"], *table["dense"]])
    figure.axes[0].set_ylabel("test perplexity")
    side_legend(figure)
    return figure
