"""Pictures of pruning, one function each: a tidy frame in, a matplotlib figure out.

The question is the title, units stand on the axes, model and protocol in the caption.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, PercentFormatter, StrMethodFormatter

from .style import METHOD_STYLE, PART_COLOURS, colour, new_figure, styled


@styled
def activation_histograms(
    frame: pd.DataFrame, epsilon: float | None = None, n_layers: int = 6, caption: str = ""
) -> Figure:
    """Distribution of mean |activation| over FFN neurons, per layer and domain.

    Parameters
    ----------
    frame : pandas.DataFrame
        Columns ``domain, layer, mean_abs``, one row per FFN neuron.
    epsilon : float, optional
        Threshold to mark.
    n_layers : int
        Layers to show, evenly spaced, first and last among them.
    caption : str
        Model, tokens.
    """
    layers = np.unique(np.linspace(0, frame["layer"].max(), n_layers).round().astype(int))
    domains = list(frame["domain"].unique())
    positive = frame.loc[frame["mean_abs"] > 0, "mean_abs"]
    edges = np.linspace(np.log10(positive.min()) - 0.1, np.log10(positive.max()) + 0.1, 41)
    zero_at = edges[0] - 0.35  # neurons that are never on stand apart, left of the scale
    columns = -(-len(layers) // 2) if len(layers) > 3 else len(layers)
    rows = -(-len(layers) // columns)
    figure = new_figure(3.2 * columns, 2.3 * rows + 0.6, caption)
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for axis, layer in zip(axes, layers, strict=False):
        for place, domain in enumerate(domains):
            values = frame.query("layer == @layer and domain == @domain")["mean_abs"].to_numpy()
            live = np.log10(values[values > 0])
            shares = np.histogram(live, edges)[0] / len(values)
            axis.stairs(shares, edges, color=colour(domain, domains), label=domain, lw=1.4)
            bar = 0.3 / len(domains)
            axis.bar(zero_at + bar * (place - len(domains) / 2), (values == 0).mean(), bar,
                     align="edge", color=colour(domain, domains))  # fmt: skip
        if epsilon:
            axis.axvline(
                np.log10(epsilon), color="black", ls="--", lw=1, label=f"ε = {epsilon:.3g}"
            )
        axis.set_title(f"layer {layer}", fontsize=9, fontweight="normal")
        axis.yaxis.set_major_formatter(PercentFormatter(1))
    for axis in axes[len(layers) :]:
        axis.set_visible(False)
    decades = 10.0 ** np.arange(np.floor(edges[0]), np.ceil(edges[-1]))
    steps = (1, 3) if len(decades) < 5 else (1,)
    marks = [step * decade for decade in decades for step in steps]
    marks = [value for value in marks if edges[0] <= np.log10(value) <= edges[-1]]
    axes[0].set_xticks([zero_at, *np.log10(marks)], ["0", *[f"{value:g}" for value in marks]])
    figure.supylabel("share of the layer's neurons", fontsize=9)
    for axis in axes[len(layers) - columns : len(layers)]:
        axis.set_xlabel("mean |activation| per token")
        axis.tick_params(labelbottom=True)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=7, fontsize=8)
    figure.suptitle("How strongly does each domain use the FFN's neurons?", x=0.01, ha="left",
                    fontsize=11, fontweight="bold")  # fmt: skip
    return figure


@styled
def overlap_matrix(overlap: pd.DataFrame, caption: str = "") -> Figure:
    """Jaccard overlap of the neurons that domains leave unused, domain by domain.

    Parameters
    ----------
    overlap : pandas.DataFrame
        Columns ``domain, other, jaccard, chance``; the diagonal compares two draws of one domain.
    caption : str
        Model, tokens, rule.
    """
    order = list(dict.fromkeys(overlap["domain"]))
    table, chance = (
        overlap.pivot(index="domain", columns="other", values=name).loc[order, order]
        for name in ("jaccard", "chance")
    )
    if table.isna().all(axis=None):
        figure = new_figure(5, 1.5, caption)
        figure.text(0.5, 0.6, "No neuron is unused in any domain: choose a larger ε.", ha="center")
        return figure
    one_level = np.ptp(chance.to_numpy()) < 0.01  # an absolute ε gives each pair a level of its own
    words = table.map("{:.2f}".format)
    if not one_level:
        words += chance.map("\n({:.2f})".format)
    note = f"chance {chance.to_numpy().mean():.2f}" if one_level else "in brackets: by chance"
    figure = new_figure(2.4 + 0.75 * len(order), 1.9 + 0.62 * len(order), caption)
    axis = figure.subplots()
    sns.heatmap(table, annot=words, fmt="", cmap="cividis", vmin=chance.to_numpy().min(), vmax=1,
                ax=axis, square=True, cbar_kws={"label": f"Jaccard overlap ({note})"})  # fmt: skip
    axis.set(title="Which domains leave the same\nneurons unused?", xlabel="", ylabel="")
    axis.tick_params(axis="x", rotation=30)
    axis.tick_params(axis="y", rotation=0)
    axis.grid(False)
    return figure


@styled
def magnitude_scatter(
    frame: pd.DataFrame, domain: str, other: str, epsilon: float | None = None, caption: str = ""
) -> Figure:
    """Each neuron's mean |activation| on one domain against another (Mini-GPTs, figure 3).

    Parameters
    ----------
    frame : pandas.DataFrame
        Columns ``domain, layer, neuron, mean_abs``.
    domain, other : str
        Horizontal and vertical axis.
    """
    wide = frame.pivot(index=["layer", "neuron"], columns="domain", values="mean_abs")
    pair = wide[[domain, other]]
    pair = pair[(pair > 0).all(axis=1)]
    figure = new_figure(4.6, 4.4, caption)
    axis = figure.subplots()
    drawn = axis.hexbin(pair[domain], pair[other], xscale="log", yscale="log", gridsize=55,
                        bins="log", mincnt=1, cmap="cividis")  # fmt: skip
    figure.colorbar(drawn, ax=axis, label="neurons")
    low, high = pair.min().min(), pair.max().max()
    axis.plot([low, high], [low, high], color="black", lw=0.8)
    if epsilon:
        axis.axvline(epsilon, color="black", ls="--", lw=1)
        axis.axhline(epsilon, color="black", ls="--", lw=1)
    correlation = np.log(pair).corr().iloc[0, 1]
    axis.set_title("Is a neuron as active in the other domain?")
    axis.set(xlabel=f"mean |activation| on {domain}", ylabel=f"mean |activation| on {other}")
    axis.text(0.97, 0.04, f"correlation of logs {correlation:.2f}", ha="right",
              transform=axis.transAxes)  # fmt: skip
    return figure


@styled
def threshold_sweep(
    sweep: pd.DataFrame,
    marks: Sequence[float] = (),
    knees: dict[str, float] | None = None,
    caption: str = "",
) -> Figure:
    """Threshold against size and against held-out perplexity, one column per component.

    Parameters
    ----------
    sweep : pandas.DataFrame
        Columns ``component, method, epsilon, stored_ratio, nonzero_ratio, perplexity_ratio``.
    marks : sequence of float
        Thresholds to mark (those of the paper).
    knees : dict, optional
        Component to the threshold of its knee.
    """
    components = list(sweep["component"].unique())
    figure = new_figure(2.75 * len(components), 4.8, caption)
    axes = figure.subplots(2, len(components), sharex="col", sharey="row", squeeze=False)
    for column, component in zip(axes.T, components, strict=True):
        part = sweep[sweep["component"] == component]
        base = part[part["method"] == "contextual"].sort_values("epsilon")
        column[0].plot(base["epsilon"], base["stored_ratio"], color="#0072B2", label="stored")
        column[0].plot(base["epsilon"], base["nonzero_ratio"], color="#0072B2", ls=":",
                       label="non-zero")  # fmt: skip
        for method, (tint, marker) in METHOD_STYLE.items():
            rows = part[part["method"] == method].sort_values("epsilon")
            if len(rows):
                column[1].plot(rows["epsilon"], rows["perplexity_ratio"], color=tint, marker=marker,
                               ms=4, lw=1.2, label=method)  # fmt: skip
        point = f": knee at ε = {knees[component]:.3g}" if knees and component in knees else ""
        column[0].set_title(component + point, fontsize=9, fontweight="normal")
        for axis in column:
            smallest = base.loc[base["epsilon"] > 0, "epsilon"].min()
            if smallest > 0:
                axis.set_xscale("symlog", linthresh=smallest, linscale=0.3)  # 0 is a threshold too
            low, high = base["epsilon"].min(), base["epsilon"].max()
            for mark in marks:
                if low <= mark <= high:
                    axis.axvline(mark, color="#999999", lw=0.8, ls="--")
            if knees and component in knees:
                axis.axvline(knees[component], color="#D55E00", lw=1)
        column[1].axhline(1, color="black", lw=0.8)
        column[1].set(yscale="log", xlabel="threshold ε")
        column[1].yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        narrow = sweep["perplexity_ratio"].max() < 20  # wider, and labels between decades collide
        column[1].yaxis.set_minor_formatter(
            StrMethodFormatter("{x:g}") if narrow else NullFormatter()
        )
    axes[0, 0].yaxis.set_major_formatter(PercentFormatter(1))
    axes[0, 0].set_ylabel("parameters left")
    axes[1, 0].set_ylabel("perplexity ÷ dense")
    axes[0, 0].legend(fontsize=8, loc="lower left")
    axes[1, 0].legend(fontsize=8, loc="upper left")
    figure.suptitle("How much can each threshold cut before the domain suffers?", x=0.01, ha="left",
                    fontsize=11, fontweight="bold")  # fmt: skip
    return figure


@styled
def budget_bars(budget: pd.DataFrame, caption: str = "") -> Figure:
    """What the stored parameters are, before and after.

    Parameters
    ----------
    budget : pandas.DataFrame
        Columns ``variant, part, parameters``.
    """
    variants = list(dict.fromkeys(budget["variant"]))
    table = budget.pivot(index="variant", columns="part", values="parameters").loc[variants]
    figure = new_figure(6.4, 0.9 + 0.55 * len(variants), caption)
    axis = figure.subplots()
    left = np.zeros(len(variants))
    for part, tint in PART_COLOURS.items():
        if part in table:
            widths = table[part].to_numpy() / 1e6
            axis.barh(variants, widths, left=left, color=tint, label=part, edgecolor="white")
            left += widths
    for place, total in enumerate(left):
        axis.text(total, place, f" {total:.4g} M", va="center", fontsize=8)
    axis.invert_yaxis()
    axis.margins(x=0.14)
    axis.set(title="Where do the parameters go?", xlabel="stored parameters (millions)")
    figure.legend(loc="outside upper right", ncols=4, fontsize=8)
    return figure


@styled
def layer_profile(kept: pd.DataFrame, caption: str = "") -> Figure:
    """Share of units kept in every layer.

    Parameters
    ----------
    kept : pandas.DataFrame
        `PruningPlan.frame`: columns ``site, layer, units, kept``.
    """
    sites = list(dict.fromkeys(kept["site"]))
    figure = new_figure(6.4, 1.1 + 1.3 * len(sites), caption)
    axes = figure.subplots(len(sites), 1, sharex=True, squeeze=False).ravel()
    for axis, site in zip(axes, sites, strict=True):
        rows = kept[kept["site"] == site]
        axis.bar(rows["layer"], rows["kept"] / rows["units"], color=PART_COLOURS[site])
        axis.set(ylim=(0, 1.02), ylabel=f"{site} kept")
        axis.yaxis.set_major_formatter(PercentFormatter(1))
    axes[-1].set_xlabel("layer")
    axes[-1].xaxis.get_major_locator().set_params(integer=True)
    axes[0].set_title("Which layers lose what?")
    return figure


@styled
def perplexity_dots(table: pd.DataFrame, caption: str = "") -> Figure:
    """Bits per character with intervals, per variant, inside and outside the domain.

    Parameters
    ----------
    table : pandas.DataFrame
        Columns ``variant, text, bits_per_character, bits_low, bits_high``.
    """
    texts = list(dict.fromkeys(table["text"]))
    variants = list(dict.fromkeys(table["variant"]))
    figure = new_figure(6.4, 0.9 + 0.45 * len(variants), caption)
    axes = figure.subplots(1, len(texts), sharey=True, squeeze=False).ravel()
    for axis, text in zip(axes, texts, strict=True):
        rows = table[table["text"] == text].set_index("variant").loc[variants]
        middle = rows["bits_per_character"]
        bounds = [middle - rows["bits_low"], rows["bits_high"] - middle]
        places = np.arange(len(variants))
        tint = colour(text.split("/")[0])
        axis.errorbar(rows["bits_per_character"], places, xerr=np.maximum(bounds, 0), fmt="o",
                      color=tint, capsize=3)  # fmt: skip
        for place, (_, row) in zip(places, rows.iterrows(), strict=True):
            value = row["bits_per_character"]
            axis.annotate(f"{value:.3f}", (value, place), xytext=(0, 6), ha="center",
                          textcoords="offset points", fontsize=7.5)  # fmt: skip
        axis.set_title(text, fontsize=9, fontweight="normal")
        axis.set_xlabel("bits per character (95 % interval)")
        axis.set_yticks(places, variants)
        axis.set_ylim(len(variants) - 0.5, -0.7)
    figure.suptitle("What does the model lose, inside and outside its domain?", x=0.01, ha="left",
                    fontsize=11, fontweight="bold")  # fmt: skip
    return figure
