"""Pictures of pruning, one function each: a tidy frame in, a matplotlib figure out.

The question is the title, units stand on the axes, model and protocol in the caption.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, NullLocator, PercentFormatter, StrMethodFormatter

from .style import METHOD_STYLE, PART_COLOURS, colour, log_ticks, new_figure, styled


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
    zero_at = edges[0] - 0.09 * np.ptp(edges)  # never on: apart, left of the scale
    some_off = len(positive) < len(frame)
    columns = -(-len(layers) // 2) if len(layers) > 3 else len(layers)
    rows = -(-len(layers) // columns)
    title = "How strongly does each domain use the FFN's neurons?"
    figure = new_figure(3 * columns + 1.4, 2.3 * rows + 0.6, caption, title)
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for axis, layer in zip(axes, layers, strict=False):
        off = []
        for place, domain in enumerate(domains):
            values = frame.query("layer == @layer and domain == @domain")["mean_abs"].to_numpy()
            live = np.log10(values[values > 0])
            shares = np.histogram(live, edges)[0] / len(values)
            axis.stairs(shares, edges, color=colour(domain, domains), label=domain, lw=1.4)
            off.append((values == 0).mean())
            if some_off:
                bar = 0.07 * np.ptp(edges) / len(domains)
                axis.bar(zero_at + bar * (place - len(domains) / 2), off[-1], bar, align="edge",
                         color=colour(domain, domains))  # fmt: skip
        if max(off) > 0:
            shares = dict.fromkeys(f"{share:.1%}" for share in (min(off), max(off)))
            axis.annotate("never on:\n" + "–".join(shares), (zero_at, max(off)), xytext=(-4, 3),
                          textcoords="offset points", fontsize=7.5)  # fmt: skip
        if epsilon:
            axis.axvline(
                np.log10(epsilon), color="black", ls="--", lw=1, label=f"ε = {epsilon:.3g}"
            )
        axis.set_title(f"layer {layer}", fontsize=9, fontweight="normal")
        axis.yaxis.set_major_formatter(PercentFormatter(1))
    for axis in axes[len(layers) :]:
        axis.set_visible(False)
    marks, words = log_ticks(10 ** edges[0], 10 ** edges[-1])
    places = list(np.log10(marks))
    if some_off:
        places, words = [zero_at, *places], ["0", *words]
    axes[0].set_xticks(places, words)
    figure.supylabel("share of the layer's neurons", fontsize=9)
    for axis in axes[len(layers) - columns : len(layers)]:
        axis.set_xlabel("mean |activation| per token")
        axis.tick_params(labelbottom=True)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8)
    return figure


@styled
def overlap_matrix(
    overlap: pd.DataFrame,
    caption: str = "",
    title: str = "Which domains leave the same neurons unused?",
) -> Figure:
    """Jaccard overlap of the sets of neurons that domains choose, domain by domain.

    Parameters
    ----------
    overlap : pandas.DataFrame
        Columns ``domain, other, jaccard, chance``; the diagonal compares two draws of one domain.
    caption : str
        Model, tokens, rule.
    title : str
        The question, if the sets are others than the unused neurons.
    """
    order = list(dict.fromkeys(overlap["domain"]))
    table, chance = (
        overlap.pivot(index="domain", columns="other", values=name).loc[order, order]
        for name in ("jaccard", "chance")
    )
    if table.isna().all(axis=None):
        figure = new_figure(5, 1.7, caption, title)
        figure.text(0.5, 0.6, "No neuron is unused in any domain: choose a larger ε.", ha="center")
        return figure
    one_level = np.ptp(chance.to_numpy()) < 0.01  # an absolute ε gives each pair a level of its own
    words = table.map("{:.2f}".format)
    if not one_level:
        words += chance.map("\n({:.2f})".format)
    note = (
        f"(by chance {chance.to_numpy().mean():.2f})" if one_level else "(in brackets: by chance)"
    )
    cells = max(len(order), 3)  # room for the words around them
    figure = new_figure(2.2 + 0.8 * cells, 1.5 + 0.62 * cells, caption, title)
    axis = figure.subplots()
    sns.heatmap(table, annot=words, fmt="", cmap="cividis", vmax=1, ax=axis, square=True,
                vmin=min(np.nanmin(chance), 0.99),
                cbar_kws={"label": f"Jaccard overlap\n{note}"})  # fmt: skip
    axis.set(xlabel="", ylabel="")
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
    live = (wide[[domain, other]] > 0).all(axis=1)
    across, up = wide.loc[live, domain], wide.loc[live, other]
    figure = new_figure(4.8, 4.5, caption, "Is a neuron as active in the other domain?")
    axis = figure.subplots()
    drawn = axis.hexbin(across, up, xscale="log", yscale="log", gridsize=55,
                        bins="log", mincnt=1, cmap="cividis")  # fmt: skip
    figure.colorbar(drawn, ax=axis, label="neurons")
    low, high = min(across.min(), up.min()), max(across.max(), up.max())
    axis.plot([low, high], [low, high], color="black", lw=0.8, label="equally active")
    if epsilon:
        axis.axvline(epsilon, color="black", ls="--", lw=1, label=f"ε = {epsilon:.3g}")
        axis.axhline(epsilon, color="black", ls="--", lw=1)
        low, high = min(low, epsilon), max(high, epsilon)
    for side in (axis.xaxis, axis.yaxis):
        side.set_ticks(*log_ticks(low, high))
        side.set_minor_locator(NullLocator())
    axis.legend(fontsize=8, loc="upper left", frameon=True, edgecolor="none")
    words = [f"correlation of logs {np.log(across).corr(np.log(up)):.2f}"]
    if not live.all():
        words.append(f"not drawn: {(~live).sum():,} of {len(live):,},\nnever on in one or both")
    axis.set(xlabel=f"mean |activation| on {domain}", ylabel=f"mean |activation| on {other}")
    axis.text(0.97, 0.04, "\n".join(words), ha="right", fontsize=8, transform=axis.transAxes,
              bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8})  # fmt: skip
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
    title = "How much can each threshold cut before the domain suffers?"
    figure = new_figure(max(2.75 * len(components), 4), 4.8, caption, title)
    axes = figure.subplots(2, len(components), sharex="col", sharey="row", squeeze=False)
    for column, component in zip(axes.T, components, strict=True):
        part = sweep[sweep["component"] == component]
        base = part[part["method"] == "contextual"].sort_values("epsilon")
        for size, look in (("stored", "o-"), ("non-zero", ".:")):
            ratios = base[size.replace("-", "") + "_ratio"]
            column[0].plot(base["epsilon"], ratios, look, color="#0072B2", ms=4, label=size)
        for method, (tint, marker) in METHOD_STYLE.items():
            rows = part[part["method"] == method].sort_values("epsilon")
            if len(rows):
                column[1].plot(rows["epsilon"], rows["perplexity_ratio"], color=tint, marker=marker,
                               ms=4, lw=1.2, label=method)  # fmt: skip
        # an end of a short curve is no knee
        knee = (knees or {}).get(component) if len(base) > 2 else None
        point = "" if knee is None else f": knee at ε = {knee:.3g}"
        column[0].set_title(component + point, fontsize=9, fontweight="normal")
        for axis in column:
            smallest = base.loc[base["epsilon"] > 0, "epsilon"].min()
            if smallest > 0:
                axis.set_xscale("symlog", linthresh=smallest, linscale=0.3)  # 0 is a threshold too
            low, high = base["epsilon"].min(), base["epsilon"].max()
            for mark in marks:
                if low <= mark <= high:
                    axis.axvline(mark, color="#999999", lw=0.8, ls="--")
            if knee is not None:
                axis.axvline(knee, color="#D55E00", lw=1)
        if not smallest * 10 <= high:  # less than a decade: no power of ten to label
            ends = [low] if low == high else [low, high]
            column[1].set_xticks(ends, [f"{end:g}" for end in ends])
        unit = " (share of tokens)" if component == "embedding" else ""
        column[1].axhline(1, color="black", lw=0.8)
        column[1].set(yscale="log", xlabel="threshold ε" + unit)
        column[1].yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        narrow = sweep["perplexity_ratio"].max() < 20  # wider, and labels between decades collide
        column[1].yaxis.set_minor_formatter(
            StrMethodFormatter("{x:g}") if narrow else NullFormatter()
        )
    axes[0, 0].yaxis.set_major_formatter(PercentFormatter(1))
    axes[0, 0].set_ylabel("parameters left")
    axes[1, 0].set_ylabel("perplexity ÷ dense")
    for axis in axes[:, 0]:
        axis.legend(fontsize=8, frameon=True, edgecolor="none")
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
    figure = new_figure(
        6.4, 1.1 + 0.45 * max(len(variants), 2), caption, "Where do the parameters go?"
    )
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
    axis.set_xlabel("stored parameters (millions)")
    figure.legend(loc="outside right upper", fontsize=8)
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
    figure = new_figure(6.4, 1.1 + 1.3 * len(sites), caption, "Which layers lose what?")
    axes = figure.subplots(len(sites), 1, sharex=True, squeeze=False).ravel()
    for axis, site in zip(axes, sites, strict=True):
        rows = kept[kept["site"] == site]
        axis.bar(rows["layer"], rows["kept"] / rows["units"], color=PART_COLOURS[site])
        axis.set(ylim=(0, 1.02), ylabel=f"{site} kept")
        axis.yaxis.set_major_formatter(PercentFormatter(1))
    axes[-1].set_xlabel("layer")
    axes[-1].xaxis.get_major_locator().set_params(integer=True)
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
    title = "What does the model lose, inside and outside its domain?"
    figure = new_figure(6.4, 1 + 0.45 * len(variants), caption, title)
    # one scale: a bit is a bit in every panel
    axes = figure.subplots(1, len(texts), sharex=True, sharey=True, squeeze=False).ravel()
    for axis, text in zip(axes, texts, strict=True):
        rows = table[table["text"] == text].set_index("variant").loc[variants]
        middle = rows["bits_per_character"]
        bounds = [middle - rows["bits_low"], rows["bits_high"] - middle]
        places = np.arange(len(variants))
        tint = colour(text.rsplit("/", 1)[0], [name.rsplit("/", 1)[0] for name in texts])
        axis.errorbar(rows["bits_per_character"], places, xerr=np.maximum(bounds, 0), fmt="o",
                      color=tint, capsize=3)  # fmt: skip
        for place, (_, row) in zip(places, rows.iterrows(), strict=True):
            value = row["bits_per_character"]
            axis.annotate(f"{value:.3f}", (value, place), xytext=(0, 6), ha="center",
                          textcoords="offset points", fontsize=7.5)  # fmt: skip
        alone = rows["bits_low"].isna().all()
        note = ": one passage, no interval" if alone else ""
        axis.set_title(text + note, fontsize=9, fontweight="normal")
        axis.set_xlabel("bits per character" + ("" if alone else " (95 % interval)"))
        axis.locator_params(axis="x", nbins=5)
        axis.set_yticks(places, variants)
        axis.set_ylim(len(variants) - 0.5, -0.7)
    return figure
