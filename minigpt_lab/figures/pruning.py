"""Pictures of a cut: what it took, and what it cost. A tidy frame in, a matplotlib figure out.

The question is the title, units stand on the axes, model and protocol in the caption.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from .frames import drawn
from .style import (
    METHOD_STYLE,
    PART_STYLE,
    heat,
    log_labels,
    new_figure,
    percent,
    style_for,
    with_note,
)

_SIZES = {"stored": "D-", "non-zero": "P:"}  # black: no method has that colour or these signs
_UNITS = {  # what ε is compared with
    "linear": "mean |input|, |output|",
    "activation": "mean |activation|",
    "embedding": "share of tokens",
    "all": "mean |input|, |output|,\n|activation|",
}


@drawn(names="component method", numbers="epsilon stored_ratio nonzero_ratio perplexity_ratio")
def threshold_sweep(
    sweep: pd.DataFrame,
    *,
    marks: Sequence[float] = (),
    knees: dict[str, float] | None = None,
    caption: str = "",
) -> Figure:
    """Threshold against size and against held-out perplexity, one column per component.

    Parameters
    ----------
    sweep : pandas.DataFrame
        Columns ``component, method, epsilon, stored_ratio, nonzero_ratio, perplexity_ratio``.
        Several rows of one point (seeds of a control) are drawn as their median and their range.
    marks : sequence of float
        Thresholds to mark (those of the paper).
    knees : dict, optional
        Component to the threshold of its knee.
    caption : str
        Model, text, protocol.
    """
    components = list(sweep["component"].unique())
    methods = list(dict.fromkeys(sweep["method"]))
    title = "How much can each threshold cut before the domain suffers?"
    figure = new_figure(max(2.6 * len(components), 4) + 1.2, 4.8, caption, title)
    axes = figure.subplots(2, len(components), sharex="col", sharey="row", squeeze=False)
    handles, marked = {}, False
    for column, component in zip(axes.T, components, strict=True):
        part = sweep[sweep["component"] == component]
        base = part[part["method"] == "contextual"].sort_values("epsilon")
        for size, line in _SIZES.items():
            ratios = base[size.replace("-", "") + "_ratio"]
            (handles[size],) = column[0].plot(base["epsilon"], ratios, line, color="black", ms=4,
                                              label=size)  # fmt: skip
        for method in sorted(methods, key=[*METHOD_STYLE, *methods].index):
            rows = part[part["method"] == method]
            if len(rows):
                handles[method] = _seeded(column[1], rows, style_for(method, methods, METHOD_STYLE))
        # an end of a short curve is no knee
        knee = (knees or {}).get(component) if len(base) > 2 else None
        point = "" if knee is None else f": knee at ε = {knee:.3g}"
        column[0].set_title(component + point, fontsize=9, fontweight="normal")
        low, high = base["epsilon"].min(), base["epsilon"].max()
        smallest = base.loc[base["epsilon"] > 0, "epsilon"].min()
        inside = [mark for mark in marks if low <= mark <= high]
        marked = marked or bool(inside)
        for axis in column:
            if smallest > 0:
                axis.set_xscale("symlog", linthresh=smallest, linscale=0.3)  # 0 is a threshold too
            for mark in inside:
                axis.axvline(mark, color="#999999", lw=0.8, ls="--")
            if knee is not None:
                axis.axvline(knee, color="#D55E00", lw=1)
        if not smallest * 10 <= high:  # less than a decade: no power of ten to label
            ends = [low] if low == high else [low, high]
            column[1].set_xticks(ends, [f"{end:g}" for end in ends])
        column[1].axhline(1, color="black", lw=0.8)
        column[1].set(yscale="log", xlabel=f"threshold ε\n({_UNITS.get(component, component)})")
    log_labels(axes[1, 0].yaxis, [1, *sweep["perplexity_ratio"]])
    axes[0, 0].yaxis.set_major_formatter(percent)
    axes[0, 0].set_ylabel("parameters left")
    axes[1, 0].set_ylabel("perplexity ÷ dense")
    if any("knee at" in axis.get_title(loc="left") for axis in axes[0]):
        handles["knee"] = Line2D([], [], color="#D55E00", lw=1, label="knee")
    if marked:
        handles["paper"] = Line2D([], [], color="#999999", lw=0.8, ls="--", label="paper's ε")
    figure.legend(handles=list(handles.values()), loc="outside right upper", fontsize=8)
    return figure


def _seeded(axis, rows: pd.DataFrame, style) -> Line2D:
    """Perplexity against ε of one method: the median over seeds, and their range as a band."""
    tint, marker = style
    seeds = rows.groupby("epsilon")["perplexity_ratio"]
    (line,) = axis.plot(seeds.median(), color=tint, marker=marker, ms=4, lw=1.2,
                        label=rows["method"].iloc[0])  # fmt: skip
    if seeds.size().max() > 1:
        line.set_label(f"{line.get_label()} (range of {seeds.size().max()} seeds)")
        axis.fill_between(seeds.median().index, seeds.min(), seeds.max(), color=tint, alpha=0.25,
                          lw=0)  # fmt: skip
    return line


@drawn(names="site", numbers="layer units kept")
def pruning_heatmap(kept: pd.DataFrame, *, caption: str = "") -> Figure:
    """Share of units that a plan cuts, layer by component, one panel per domain.

    The bars are means: over the components above, over the layers at the right.

    Parameters
    ----------
    kept : pandas.DataFrame
        `PruningPlan.frame`: columns ``site, layer, units, kept``; with several plans also
        ``domain``. All panels share one scale; two domains get a third panel, their difference.
    caption : str
        Model, rule.
    """
    sites = list(dict.fromkeys(kept["site"]))
    panels, highest = _cut_tables(kept, sites)
    scales = dict.fromkeys(panels, {"cmap": "cividis", "vmin": 0, "vmax": highest})
    if len(panels) == 2:
        (one, first), (other, second) = panels.items()
        gap = panels[f"{other} − {one}"] = second - first
        reach = max(0.01, gap.abs().max(axis=None))
        scales[f"{other} − {one}"] = {"cmap": "PuOr_r", "vmin": -reach, "vmax": reach}
    width = min(max(0.3 * kept["layer"].nunique(), 3.6), 12.0)
    heights = [0.5, 0.32 * len(sites)]
    units = "; ".join(
        f"{site} {'–'.join(f'{count:,}' for count in sorted({found.min(), found.max()}))}"
        for site, found in kept.groupby("site", sort=False)["units"]
    )
    note = f"in the cells: % of the layer's units that are cut; units per layer: {units}"
    if kept["kept"].sum() == kept["units"].sum():
        note += "\nno unit is cut: what a plan only zeroes is not counted here"
    size = (width + 2.6, len(panels) * (sum(heights) + 0.45) + 0.9)
    figure = new_figure(*size, with_note(caption, note), "Which layers lose what?")
    grid = figure.add_gridspec(
        2 * len(panels), 3, width_ratios=[width, 0.9, 0.12], height_ratios=heights * len(panels)
    )
    for place, (name, table) in enumerate(panels.items()):
        above = figure.add_subplot(grid[2 * place, 0])
        cells, beside, bar = (
            figure.add_subplot(grid[2 * place + 1, column]) for column in range(3)
        )
        _cut_panel(cells, table, bar, **scales[name])
        _cut_means(above, beside, table, highest if scales[name]["vmin"] == 0 else None)
        above.set_title(name, fontsize=9, fontweight="normal")
    cells.set_xlabel("layer")
    return figure


def _cut_tables(kept: pd.DataFrame, sites: list[str]) -> tuple[dict[str, pd.DataFrame], float]:
    """Per domain the share cut ``[site, layer]``, and the highest of all."""
    cut = kept.assign(cut=1 - kept["kept"] / kept["units"])
    plans = cut.groupby("domain", sort=False) if "domain" in cut else [("", cut)]
    tables = {
        name: rows.pivot(index="site", columns="layer", values="cut").loc[sites]
        for name, rows in plans
    }
    return tables, max(0.01, cut["cut"].max())


def _cut_means(above, beside, table: pd.DataFrame, highest: float | None) -> None:
    """Bars of the means over components and over layers, on the scale that plans share."""
    above.bar(np.arange(len(table.columns)) + 0.5, table.mean(), color="#777777")
    above.set(xlim=(0, len(table.columns)), xticks=[])
    above.yaxis.set_major_formatter(percent)
    above.yaxis.set_major_locator(MaxNLocator(2))
    above.tick_params(labelsize=7)
    bars = beside.barh(np.arange(len(table)) + 0.5, table.mean(axis=1), color="#777777")
    beside.bar_label(bars, map(percent, table.mean(axis=1)), padding=2, fontsize=7)
    beside.set(ylim=(len(table), 0), yticks=[], xticks=[])
    beside.spines["bottom"].set_visible(False)
    if highest is not None:
        above.set_ylim(0, highest)
        beside.set_xlim(0, highest)


def _cut_panel(axis, table: pd.DataFrame, bar, **scale) -> None:
    """Cells of one plan or of a difference, in per cent; zero stays empty."""

    def word(share: float) -> str:
        if share == 0:
            return ""
        if (
            scale["vmin"] < 0
        ):  # a difference; grey print does not tell the two ends of the colours apart
            return f"{100 * share:+.0f}".replace("-", "−")
        return f"{100 * share:.0f}" if share >= 0.005 else "<1"

    heat(axis, table, table.map(word), 7, cbar_ax=bar, linewidths=0.5, **scale)
    every = 1 if len(table.columns) <= 40 else 5
    axis.set_xticks(np.arange(0, len(table.columns), every) + 0.5, table.columns[::every])
    axis.tick_params(axis="both", rotation=0, length=2)
    bar.yaxis.set_major_formatter(percent)
    bar.set_ylabel("units cut", fontsize=8)


@drawn(names="variant part", numbers="parameters")
def budget_bars(budget: pd.DataFrame, *, caption: str = "") -> Figure:
    """What the stored parameters are, before and after.

    Parameters
    ----------
    budget : pandas.DataFrame
        Columns ``variant, part, parameters``.
    caption : str
        Model, what was cut.
    """
    variants = list(dict.fromkeys(budget["variant"]))
    table = budget.pivot(index="variant", columns="part", values="parameters").loc[variants] / 1e6
    totals = table.sum(axis=1)
    figure = new_figure(
        6.4, 1.1 + 0.45 * max(len(variants), 2), caption, "Where do the parameters go?"
    )
    axis = figure.subplots()
    left = np.zeros(len(variants))
    for part, (tint, hatch) in PART_STYLE.items():
        if part in table:
            bars = axis.barh(variants, table[part], left=left, color=tint, label=part,
                             edgecolor="white", hatch=hatch)  # fmt: skip
            room = table[part] > 0.09 * totals.max()
            words = [f"{value:.3g} M" if fits else "" for value, fits in
                     zip(table[part], room, strict=True)]  # fmt: skip
            axis.bar_label(bars, words, label_type="center", fontsize=7.5,
                           bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})  # fmt: skip
            left += table[part].to_numpy()
    for place, total in enumerate(totals):
        axis.text(total, place, f" {total:.4g} M", va="center", fontsize=8)
    axis.invert_yaxis()
    axis.margins(x=0.14)
    axis.set_xlabel("stored parameters (millions)")
    figure.legend(loc="outside right upper", fontsize=8)
    return figure


@drawn(names="variant text", numbers="bits_per_character characters", maybe="bits_low bits_high")
def perplexity_dots(table: pd.DataFrame, *, caption: str = "") -> Figure:
    """Bits per character with intervals, per variant, inside and outside the domain.

    Parameters
    ----------
    table : pandas.DataFrame
        Columns ``variant, text, bits_per_character, bits_low, bits_high, characters``.
    caption : str
        Model, protocol.
    """
    texts = list(dict.fromkeys(table["text"]))
    variants = list(dict.fromkeys(table["variant"]))
    title = "What does the model lose, inside and outside its domain?"
    figure = new_figure(6.4, 1.1 + 0.45 * len(variants), caption, title)
    # one scale: a bit is a bit in every panel
    axes = figure.subplots(1, len(texts), sharex=True, sharey=True, squeeze=False).ravel()
    domains = [text.rsplit("/", 1)[0] for text in texts]
    for axis, text, domain in zip(axes, texts, domains, strict=True):
        rows = table[table["text"] == text].set_index("variant").loc[variants]
        middle = rows["bits_per_character"]
        bounds = [middle - rows["bits_low"], rows["bits_high"] - middle]
        places = np.arange(len(variants))
        tint, marker = style_for(domain, domains)
        axis.errorbar(middle, places, xerr=np.maximum(bounds, 0), fmt=marker, color=tint,
                      capsize=3)  # fmt: skip
        for place, value in zip(places, middle, strict=True):
            axis.annotate(f"{value:.3f}", (value, place), xytext=(0, 6), ha="center",
                          textcoords="offset points", fontsize=7.5)  # fmt: skip
        alone = rows["bits_low"].isna().all()
        note = "\none passage, no interval" if alone else ""
        head = f"{text}, n = {rows['characters'].iloc[0]:,.0f} characters{note}"
        axis.set_title(head, fontsize=8.5, fontweight="normal")
        axis.set_xlabel("bits per character" + ("" if alone else " (95 % interval)"))
        axis.locator_params(axis="x", nbins=5)
        axis.set_yticks(places, variants)
        axis.set_ylim(len(variants) - 0.5, -0.7)
    return figure
