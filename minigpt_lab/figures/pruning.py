"""Pruning: sizes and losses by threshold, by layer, by part and by text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from .axes import (
    heat,
    line_with_range,
    log_labels,
    percent,
    row_labels,
    side_legend,
    spread,
    value_labels,
)
from .frames import draws_frame
from .style import METHOD_STYLE, PART_STYLE, new_figure, style_for, text_style, with_note

_SIZES = {"stored": "D-", "non-zero": "P:"}  # black: no method has that colour or these signs
_UNITS = {  # what ε is compared with
    "linear": "mean |input|, |output|",
    "activation": "mean |activation|",
    "embedding": "share of tokens",
    "all": "mean |input|, |output|,\n|activation|",
}


@draws_frame(
    names="component method", numbers="epsilon stored_ratio nonzero_ratio perplexity_ratio"
)
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
    components, methods = (list(sweep[name].unique()) for name in ("component", "method"))
    title = "How much can each threshold prune before the domain suffers?"
    figure = new_figure(max(2.6 * len(components), 4) + 1.2, 4.8, caption, title)
    axes = figure.subplots(2, len(components), sharex="col", sharey="row", squeeze=False)
    handles: dict[str, Line2D] = {}
    for (above, below), component in zip(axes.T, components, strict=True):
        part = sweep[sweep["component"] == component]
        base = part[part["method"] == "contextual"].sort_values("epsilon")
        for size, line in _SIZES.items():
            ratios = base[size.replace("-", "") + "_ratio"]
            (handles[size],) = above.plot(
                base["epsilon"], ratios, line, color="black", ms=4, label=size
            )
        for method in sorted(methods, key=[*METHOD_STYLE, *methods].index):
            rows = part[part["method"] == method]
            if len(rows):
                handles[method] = _sweep_line(below, rows, style_for(method, methods, METHOD_STYLE))
        # an end of a short curve is no knee
        knee = (knees or {}).get(component) if len(base) > 2 else None
        above.set_title(component if knee is None else f"{component}: knee at ε = {knee:.3g}")
        _epsilon_axis(below, base["epsilon"])
        inside = [mark for mark in marks if base["epsilon"].min() <= mark <= base["epsilon"].max()]
        for axis in (above, below):
            for mark in inside:
                line = axis.axvline(mark, color="#999999", lw=0.8, ls="--", label="paper's ε")
                handles["paper"] = line
            if knee is not None:
                handles["knee"] = axis.axvline(knee, color="#D55E00", lw=1, label="knee")
        below.axhline(1, color="black", lw=0.8)
        below.set(yscale="log", xlabel=f"threshold ε\n({_UNITS.get(component, component)})")
    log_labels(axes[1, 0].yaxis, [1, *sweep["perplexity_ratio"]])
    axes[0, 0].yaxis.set_major_formatter(percent)
    axes[0, 0].set_ylabel("parameters kept")
    axes[1, 0].set_ylabel("perplexity ÷ dense")
    last = [handles.pop(name) for name in ("knee", "paper") if name in handles]
    figure.legend(handles=[*handles.values(), *last], loc="outside right upper")
    return figure


def _sweep_line(axis, rows: pd.DataFrame, style: tuple[str, str]) -> Line2D:
    """Perplexity against ε of one method, over its seeds."""
    seeds = rows.groupby("epsilon")["perplexity_ratio"]
    count, label = seeds.size().max(), rows["method"].iloc[0]
    label += f" (range of {count} seeds)" if count > 1 else ""
    line_with_range(axis, seeds, color=style[0], marker=style[1], ms=4, lw=1.2, label=label)
    return axis.lines[-1]


def _epsilon_axis(axis, epsilons: pd.Series) -> None:
    """A log axis on which zero has a place, as it is a threshold too."""
    low, high, smallest = epsilons.min(), epsilons.max(), epsilons[epsilons > 0].min()
    if smallest > 0:
        axis.set_xscale("symlog", linthresh=smallest, linscale=0.3)
    if not smallest * 10 <= high:  # less than a decade: no power of ten to label
        ends = sorted({low, high})
        axis.set_xticks(ends, [f"{end:g}" for end in ends])


@draws_frame(names="site", numbers="layer units kept")
def pruning_heatmap(kept: pd.DataFrame, *, caption: str = "") -> Figure:
    """Share of units that a plan removes, layer by component, one panel per domain.

    The bars are means: over the components above, over the layers at the right.

    Parameters
    ----------
    kept : pandas.DataFrame
        `PruningPlan.frame`: columns ``site, layer, units, kept``; with several plans also
        ``domain``. All panels share one scale; two domains get a third panel, their difference.
    caption : str
        Model, rule.
    """
    sites = list(kept["site"].unique())
    panels, highest = _removed_shares(kept, sites)
    scales = dict.fromkeys(panels, {"cmap": "cividis", "vmin": 0, "vmax": highest})
    if len(panels) == 2:
        (one, first), (other, second) = panels.items()
        gap = panels[f"{other} − {one}"] = second - first
        limit = max(0.01, gap.abs().max(axis=None))
        scales[f"{other} − {one}"] = {"cmap": "PuOr_r", "vmin": -limit, "vmax": limit}
    width = min(max(0.3 * kept["layer"].nunique(), 3.6), 12.0)
    heights = [0.5, 0.32 * len(sites)]
    units = "; ".join(
        f"{site} {'–'.join(f'{n:,}' for n in sorted({counts.min(), counts.max()}))}"
        for site, counts in kept.groupby("site", sort=False)["units"]
    )
    note = f"in the cells: % of the layer's units that are removed; units per layer: {units}"
    if kept["kept"].sum() == kept["units"].sum():
        note += "\nno unit is removed: weights that a plan only zeroes are not counted here"
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
        _share_cells(cells, table, bar, **scales[name])
        _mean_bars(above, beside, table, highest if scales[name]["vmin"] == 0 else None)
        above.set_title(name)
    cells.set_xlabel("layer")
    return figure


def _removed_shares(kept: pd.DataFrame, sites: list[str]) -> tuple[dict[str, pd.DataFrame], float]:
    """Per domain the share removed ``[site, layer]``, and the highest of all."""
    shares = kept.assign(removed=1 - kept["kept"] / kept["units"])
    plans = shares.groupby("domain", sort=False) if "domain" in shares else [("", shares)]
    tables = {
        name: rows.pivot(index="site", columns="layer", values="removed").loc[sites]
        for name, rows in plans
    }
    return tables, max(0.01, shares["removed"].max())


def _mean_bars(above, beside, table: pd.DataFrame, highest: float | None) -> None:
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


def _share_cells(axis, table: pd.DataFrame, bar, **scale) -> None:
    """Cells of one plan or of a difference, in per cent; zero stays empty."""

    def word(share: float) -> str:
        if share == 0:
            return ""
        if scale["vmin"] < 0:  # a difference; in grey the ends of the colours look the same
            return f"{100 * share:+.0f}".replace("-", "−")
        return f"{100 * share:.0f}" if share >= 0.005 else "<1"

    heat(axis, table, table.map(word), 7, cbar_ax=bar, linewidths=0.5, **scale)
    every = 1 if len(table.columns) <= 40 else 5
    axis.set_xticks(np.arange(0, len(table.columns), every) + 0.5, table.columns[::every])
    axis.tick_params(axis="both", rotation=0, length=2)
    bar.yaxis.set_major_formatter(percent)
    bar.set_ylabel("units removed", fontsize=8)


@draws_frame(names="variant part", numbers="parameters")
def budget_bars(budget: pd.DataFrame, *, caption: str = "") -> Figure:
    """Stored parameters by part, before and after pruning.

    Parameters
    ----------
    budget : pandas.DataFrame
        Columns ``variant, part, parameters``.
    caption : str
        Model, plan.
    """
    variants = list(budget["variant"].unique())
    table = budget.pivot(index="variant", columns="part", values="parameters").loc[variants] / 1e6
    totals = table.sum(axis=1)
    figure = new_figure(
        6.4, 1.1 + 0.45 * max(len(variants), 2), caption, "Where do the parameters go?"
    )
    axis = figure.subplots()
    left = np.zeros(len(variants))
    for part, (tint, hatch) in PART_STYLE.items():
        if part in table:
            place = {"left": left, "color": tint, "hatch": hatch, "edgecolor": "white"}
            bars = axis.barh(variants, table[part], label=part, **place)
            fits = table[part] > 0.09 * totals.max()
            words = [f"{value:.3g} M" for value in table[part]]
            words = np.where(fits, words, "")
            box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
            axis.bar_label(bars, words, label_type="center", fontsize=7.5, bbox=box)
            left += table[part].to_numpy()
    for place, total in enumerate(totals):
        axis.text(total, place, f" {total:.4g} M", va="center", fontsize=8)
    axis.invert_yaxis()
    axis.margins(x=0.14)
    axis.set_xlabel("stored parameters (millions)")
    side_legend(figure)
    return figure


@draws_frame(
    names="variant text", numbers="bits_per_character characters", maybe="bits_low bits_high"
)
def perplexity_dots(table: pd.DataFrame, *, caption: str = "") -> Figure:
    """Bits per character with intervals, per variant, inside and outside the domain.

    Parameters
    ----------
    table : pandas.DataFrame
        Columns ``variant, text, bits_per_character, bits_low, bits_high, characters``.
    caption : str
        Model, protocol.
    """
    texts, variants = (list(table[name].unique()) for name in ("text", "variant"))
    title = "What does the model lose, inside and outside its domain?"
    figure = new_figure(6.4, 1.1 + 0.45 * len(variants), caption, title)
    # one scale: a bit is a bit in every panel
    axes = figure.subplots(1, len(texts), sharex=True, sharey=True, squeeze=False).ravel()
    for axis, text in zip(axes, texts, strict=True):
        rows = table[table["text"] == text].set_index("variant").loc[variants]
        bits, (tint, marker) = rows["bits_per_character"], text_style(text, texts)
        lengths = spread(bits, rows["bits_low"], rows["bits_high"])
        axis.errorbar(bits, range(len(bits)), xerr=lengths, fmt=marker, color=tint, capsize=3)
        value_labels(axis, bits, map("{:.3f}".format, bits))
        alone = rows["bits_low"].isna().all()
        note = "\none passage, no interval" if alone else ""
        count = f"{rows['characters'].iloc[0]:,.0f}"
        axis.set_title(f"{text}, n = {count} characters{note}", fontsize=8.5)
        axis.set_xlabel("bits per character" + ("" if alone else " (95 % interval)"))
        axis.locator_params(axis="x", nbins=5)
        row_labels(axis, variants)
    return figure
