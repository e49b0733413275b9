"""Pruning: sizes and losses by threshold, by layer, by part and by text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .axes import dot_rows, group_lines, heat, log_labels, panel_row, percent, side_legend
from .frames import draws_frame
from .style import METHOD_STYLE, PART_STYLE, looks, new_figure, with_note

_SIZES = {"stored": "D-", "non-zero": "P:"}  # black: no method has that colour
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
        Several rows of one point (seeds of a control) are dots, and their mean is the line.
    marks : sequence of float
        Thresholds to mark (those of the paper).
    knees : dict, optional
        Component to the threshold of its knee.
    caption : str
        Model, text, protocol.
    """
    components, styles = list(sweep["component"].unique()), looks(sweep["method"], METHOD_STYLE)
    title = "How much can each threshold prune before the domain suffers?"
    figure = new_figure(max(2.6 * len(components), 4) + 1.2, 4.8, caption, title)
    axes = figure.subplots(2, len(components), sharex="col", sharey="row", squeeze=False)
    for (above, below), component in zip(axes.T, components, strict=True):
        part = sweep[sweep["component"] == component]
        base = part[part["method"] == "contextual"].sort_values("epsilon")
        for size, line in _SIZES.items():
            ratios = base[size.replace("-", "") + "_ratio"]
            above.plot(base["epsilon"], ratios, line, color="black", ms=4, label=size)
        group_lines(below, part, "epsilon", "perplexity_ratio", styles, by="method")
        # an end of a short curve is no knee
        knee = (knees or {}).get(component) if len(base) > 2 else None
        above.set_title(component if knee is None else f"{component}: knee at ε = {knee:.3g}")
        _epsilon_axis(below, base["epsilon"])
        for axis in (above, below):
            if knee is not None:
                axis.axvline(knee, color="#D55E00", lw=1, label="knee")
            for mark in marks:
                if base["epsilon"].min() <= mark <= base["epsilon"].max():
                    axis.axvline(mark, color="#999999", lw=0.8, ls="--", label="paper's ε")
        below.axhline(1, color="black", lw=0.8)
        below.set(yscale="log", xlabel=f"threshold ε\n({_UNITS.get(component, component)})")
    log_labels(axes[1, 0].yaxis, [1, *sweep["perplexity_ratio"]])
    axes[0, 0].yaxis.set_major_formatter(percent)
    axes[0, 0].set_ylabel("parameters kept")
    axes[1, 0].set_ylabel("perplexity ÷ dense")
    side_legend(figure)
    return figure


def _epsilon_axis(axis: Axes, epsilons: pd.Series) -> None:
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

    Parameters
    ----------
    kept : pandas.DataFrame
        `PruningPlan.frame`: columns ``site, layer, units, kept``; with several plans also
        ``domain``. All panels share one scale; two domains get a third panel, their difference.
    caption : str
        Model, rule.
    """
    shares = kept.assign(removed=1 - kept["kept"] / kept["units"], domain=kept.get("domain", ""))
    sites, layers = shares["site"].unique(), shares["layer"].nunique()
    panels = {
        name: rows.pivot(index="site", columns="layer", values="removed").loc[sites]
        for name, rows in shares.groupby("domain", sort=False)
    }
    highest = max(0.01, shares["removed"].max())
    scales = dict.fromkeys(panels, {"cmap": "cividis", "vmin": 0, "vmax": highest})
    forms = dict.fromkeys(panels, "{:.0f}")
    if len(panels) == 2:
        (one, first), (other, second) = panels.items()
        name = f"{other} − {one}"
        panels[name], forms[name] = second - first, "{:+.0f}"  # a sign, for grey
        limit = max(0.01, panels[name].abs().max(axis=None))
        scales[name] = {"cmap": "PuOr_r", "vmin": -limit, "vmax": limit}
    units = "; ".join(
        f"{site} {'–'.join(f'{n:,}' for n in sorted({counts.min(), counts.max()}))}"
        for site, counts in kept.groupby("site", sort=False)["units"]
    )
    uniform = shares.groupby(["domain", "site"])["removed"].nunique().eq(1).all()
    cells = "" if uniform else "in the cells: % of the layer's units that are removed; "
    note = f"{cells}units per layer: {units}"
    if not shares["removed"].any():
        note += "\nno unit is removed: weights that a plan only zeroes are not counted here"
    width, height = min(max(0.3 * layers, 3.6), 12.0) + 2.6, 0.32 * len(sites) + 0.6
    size = (width, height * len(panels) + 0.7)
    figure = new_figure(*size, with_note(caption, note), "Which layers lose what?")
    axes = figure.subplots(len(panels), 1, squeeze=False).ravel()
    for axis, (name, table) in zip(axes, panels.items(), strict=True):
        words = table.mul(100).map(lambda share, form=forms[name]: form.format(share))
        same = table.nunique(axis=1) == 1  # the axis says how much, once
        words = words.replace("-", "−", regex=True).where(table.ne(0).mul(~same, axis=0), "")
        ends = sorted({scales[name]["vmin"], 0, scales[name]["vmax"]})
        bar = {"label": "removed", "format": percent, "ticks": ends}
        heat(axis, table, words, 7, linewidths=0.5, cbar_kws=bar, **scales[name])
        every = 1 if layers <= 40 else 5
        axis.set_xticks(np.arange(0, layers, every) + 0.5, table.columns[::every])
        means = [
            f"{site} ({percent(mean)} each)" if same[site] else f"{site} (mean {percent(mean)})"
            for site, mean in table.mean(axis=1).items()
        ]
        axis.set_yticks(np.arange(len(sites)) + 0.5, means)
        axis.tick_params(rotation=0)
        axis.set_title(name)
    axes[-1].set_xlabel("layer")
    return figure


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
    size = (6.4, 1.1 + 0.45 * max(len(variants), 2))
    figure = new_figure(*size, caption, "Where do the parameters go?")
    axis = figure.subplots()
    left = np.zeros(len(variants))
    for part, (tint, hatch) in PART_STYLE.items():
        if part in table:
            most = table[part].max()
            label = part if most > 0.01 * totals.max() else f"{part} ({most:.2g} M)"  # too thin
            look = {"color": tint, "hatch": hatch, "edgecolor": "white", "label": label}
            bars = axis.barh(variants, table[part], left=left, **look)
            fits = table[part] > 0.05 * totals.max()
            words = np.where(fits, table[part].map("{:.3g}".format), "")
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


@draws_frame(names="variant text", numbers="bits_per_character characters bits_low bits_high")
def perplexity_dots(table: pd.DataFrame, *, caption: str = "") -> Figure:
    """Bits per character with intervals, per variant, inside and outside the domain.

    Parameters
    ----------
    table : pandas.DataFrame
        Columns ``variant, text, bits_per_character, bits_low, bits_high, characters``.
    caption : str
        Model, protocol.
    """
    variants, styles = list(table["variant"].unique()), looks(table["text"])
    title = "What does the model lose, inside and outside its domain?"
    size = (2.9, 1.1 + 0.45 * len(variants))
    figure, panels = panel_row(
        table, "text", caption, title, size=size, beside=0.8, sharex=True, sharey=True
    )  # one scale: a bit is a bit in every panel
    for axis, text, rows in panels:
        columns = ("bits_per_character", "bits_low", "bits_high")
        rows = rows.set_index("variant").loc[variants]
        dot_rows(axis, rows, columns, "{:.3f}".format, **styles[text])
        alone = rows["bits_low"].isna().all()
        note = "\none passage, no interval" if alone else ""
        count = f"{rows['characters'].iloc[0]:,.0f}"
        axis.set_title(f"{text}, n = {count} characters{note}", fontsize=8.5)
        axis.set_xlabel("bits per character" + ("" if alone else " (95 % interval)"))
        axis.locator_params(axis="x", nbins=5)
    return figure
