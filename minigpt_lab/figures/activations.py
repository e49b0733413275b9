"""Pictures of what a domain switches on: a tidy frame in, a matplotlib figure out.

The question is the title, units stand on the axes, model and protocol in the caption.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from .frames import drawn
from .style import (
    colour,
    heat,
    layer_ticks,
    log_labels,
    log_ticks,
    new_figure,
    percent,
    style_for,
    with_note,
)

MAGNITUDE = "mean |activation| per token"


@drawn(names="domain", numbers="layer mean_abs")
def activation_histograms(
    frame: pd.DataFrame, *, epsilon: float | None = None, n_layers: int = 6, caption: str = ""
) -> Figure:
    """Distribution of mean |activation| over FFN neurons, per layer and domain.

    Parameters
    ----------
    frame : pandas.DataFrame
        Columns ``domain, layer, mean_abs``, one row per FFN neuron.
    epsilon : float, optional
        Threshold to mark, with the share of neurons at or below it.
    n_layers : int
        Layers to show, evenly spaced, first and last among them.
    caption : str
        Model, tokens.
    """
    layers = np.unique(np.linspace(0, frame["layer"].max(), n_layers).round().astype(int))
    domains = list(frame["domain"].unique())
    magnitudes = frame["mean_abs"].to_numpy()
    positive = magnitudes[magnitudes > 0]
    # half a per cent lies far out, on two thirds of the scale: the last bin holds it
    highest = max(np.quantile(positive, 0.995), epsilon or 0)
    edges = np.linspace(np.log10(positive.min()) - 0.1, np.log10(highest) + 0.1, 41)
    some_off = len(positive) < len(frame)
    zero_at = edges[0] - 0.09 * np.ptp(edges) if some_off else None  # apart, left of the scale
    free = "right" if np.median(np.log10(positive)) < edges.mean() else "left"
    shown = frame[frame["layer"].isin(layers)].groupby(["layer", "domain"])["mean_abs"]
    counts = shown.size()
    neurons = "–".join(f"{count:,}" for count in sorted({counts.min(), counts.max()}))
    note = f"n = {neurons} neurons per layer and domain; the last bin holds all above"
    figure, axes = _panels(len(layers), with_note(caption, note), domains)
    for axis, layer in zip(axes, layers, strict=True):
        values = {domain: shown.get_group((layer, domain)).to_numpy() for domain in domains}
        for domain, found in values.items():
            tint, marker = style_for(domain, domains)
            _distribution(axis, found, edges, color=tint, marker=marker, label=domain)
        if some_off:
            _never_on(axis, values, zero_at, np.ptp(edges))
        if epsilon:
            axis.axvline(
                np.log10(epsilon), color="black", ls="--", lw=1, label=f"ε = {epsilon:.3g}"
            )
        title = f"layer {layer}"
        if epsilon:
            title += _shares_below(axis, values, epsilon, free)
        axis.set_title(title, fontsize=9, fontweight="normal")
    axes[0].yaxis.set_major_formatter(percent)
    axes[0].yaxis.set_major_locator(MaxNLocator(3))
    axes[0].set_ylim(0, axes[0].get_ylim()[1])
    marks, words = log_ticks(10 ** edges[0], 10 ** edges[-1])
    places = list(np.log10(marks))
    if some_off:
        places, words = [zero_at, *places], ["0", *words]
    axes[0].set_xticks(places, words)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper right", fontsize=8)
    return figure


def _panels(count: int, caption: str, domains: list[str]):
    """A figure and its panels, in at most two rows, with room for a legend at the right.

    A slider waits for this picture: its margins are counted in inches, because a constrained layout
    would take a quarter of the time.
    """
    columns = -(-count // 2) if count > 3 else count
    rows = -(-count // columns)
    title = "How strongly does each domain use the FFN's neurons?"
    legend = 0.7 + 0.07 * max(map(len, domains))
    figure = new_figure(2.9 * columns + 0.8 + legend, 2.3 * rows + 0.9, caption, title, layout=None)
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for axis in axes[count:]:
        axis.set_visible(False)
    for axis in axes[count - columns : count]:
        axis.set_xlabel(MAGNITUDE)
        axis.tick_params(labelbottom=True)
    figure.supylabel("share of the layer's neurons", fontsize=9, x=0.1 / figure.get_figwidth())
    width, height = figure.get_size_inches()
    head, foot = (text.count("\n") + 1 for text in (figure.get_suptitle(), figure.get_supxlabel()))
    figure.subplots_adjust(
        left=0.75 / width, right=1 - (legend + 0.1) / width, wspace=0.06,
        top=1 - (0.34 + 0.19 * head) / height, bottom=(0.55 + 0.13 * foot) / height,
        hspace=0.22 if count % columns == 0 else 0.5,
    )  # fmt: skip
    return figure, axes[:count]


def _never_on(axis, values: dict[str, np.ndarray], zero_at: float, scale: float) -> None:
    """The share of neurons that are exactly zero, as bars of their own."""
    off = [(found == 0).mean() for found in values.values()]
    bar = 0.07 * scale / len(off)
    axis.bar(zero_at + bar * (np.arange(len(off)) - len(off) / 2), off, bar, align="edge",
             color=[colour(domain, list(values)) for domain in values])  # fmt: skip
    if max(off) > 0:
        shares = dict.fromkeys(f"{100 * share:.1f} %" for share in (min(off), max(off)))
        axis.annotate("never on:\n" + "–".join(shares), (zero_at, max(off)), xytext=(-4, 3),
                      textcoords="offset points", fontsize=7.5)  # fmt: skip


def _distribution(axis, values: np.ndarray, edges: np.ndarray, **how) -> None:
    """Steps over the logs of the values that are not zero, a marker on each that holds some."""
    logs = np.minimum(np.log10(values[values > 0]), edges[-1])
    shares = np.histogram(logs, edges)[0] / len(values)
    middles = (edges[:-1] + edges[1:]) / 2
    axis.plot(middles, shares, drawstyle="steps-mid", lw=1.2, ms=3,
              markevery=np.flatnonzero(shares > 0.01).tolist(), **how)  # fmt: skip


def _shares_below(axis, values: dict[str, np.ndarray], epsilon: float, side: str) -> str:
    """Write each domain's share at or below ε where there is room; return one domain's instead."""
    words = [f"{100 * (found <= epsilon).mean():.1f} %" for found in values.values()]
    if len(words) == 1:
        return f": {words[0]} at or below ε"
    names = [name if len(name) <= 12 else f"{name[:11]}…" for name in values]
    lines = map(" ".join, zip(names, words, strict=True))
    text = "\n".join(["at or below ε:", *lines])
    axis.text(1 if side == "right" else 0.02, 1, text, transform=axis.transAxes, ha=side, va="top",
              fontsize=7)  # fmt: skip
    return ""


@drawn(names="domain", numbers="layer mean_abs")
def activation_depth(
    frame: pd.DataFrame, *, epsilon: float | None = None, caption: str = ""
) -> Figure:
    """How the scale of mean |activation| drifts with depth, and what one ε would cut of each layer.

    Parameters
    ----------
    frame : pandas.DataFrame
        Columns ``domain, layer, mean_abs``, one row per FFN neuron.
    epsilon : float, optional
        Threshold to mark; the lowest panel shows the share of each layer at or below it.
    caption : str
        Model, tokens.
    """
    domains, layers = list(frame["domain"].unique()), int(frame["layer"].max()) + 1
    levels = (0.01, 0.1, 0.5, 0.9, 0.99)
    bands = frame.groupby(["domain", "layer"])["mean_abs"].quantile(list(levels)).unstack()
    columns = min(len(domains), 3)
    rows = -(-len(domains) // columns)
    title = "How does the scale drift with depth, and what would one ε cut?"
    count = len(frame) // frame.groupby(["domain", "layer"]).ngroups
    note = (
        f"line: median neuron; bands: the middle 80 % and 98 % of a layer's n = {count:,} neurons"
    )
    below = epsilon is not None
    height = 1.9 * rows + 2.2 * below + 0.6
    width = 2.6 * max(columns, 2) + 1.2
    figure = new_figure(width, height, with_note(caption, note), title)
    grid = figure.add_gridspec(rows + below, columns, height_ratios=[1] * rows + [1.1] * below)
    first = None
    for place, domain in enumerate(domains):
        axis = figure.add_subplot(grid[divmod(place, columns)], sharex=first, sharey=first)
        first = first or axis
        found, tint = bands.loc[domain].clip(lower=np.nextafter(0, 1)), colour(domain, domains)
        for low, high, alpha in ((0.01, 0.99, 0.18), (0.1, 0.9, 0.35)):
            axis.fill_between(found.index, found[low], found[high], color=tint, alpha=alpha, lw=0)
        axis.plot(found.index, found[0.5], color=tint, lw=1.6)
        if below:
            axis.axhline(epsilon, color="black", ls="--", lw=1)
        axis.set_title(domain, fontsize=9, fontweight="normal")
        axis.label_outer()
        if place % columns == 0:
            axis.set_ylabel("mean |activation|")
        if place >= len(domains) - columns:
            axis.set_xlabel("layer")
            axis.tick_params(labelbottom=True)
    first.set_yscale("log", nonpositive="clip")
    drawn = bands.to_numpy()
    log_labels(first.yaxis, drawn[drawn > 0])
    first.set_ylim(drawn[drawn > 0].min() / 1.2, drawn.max() * 1.2)
    layer_ticks(first, layers, room=12)
    if below:
        axis = figure.add_subplot(grid[rows, :])
        _cut_by_depth(axis, frame, domains, epsilon)
        layer_ticks(axis, layers, room=int(4.4 * width))
    return figure


def _cut_by_depth(axis, frame, domains, epsilon) -> None:
    """Share of each layer at or below ε, a line per domain."""
    cut = (frame["mean_abs"] <= epsilon).groupby([frame["domain"], frame["layer"]]).mean()
    for domain in domains:
        tint, marker = style_for(domain, domains)
        shares = cut.loc[domain]
        axis.plot(shares.index, shares, color=tint, marker=marker, ms=4, lw=1.2, label=domain)
    axis.set(xlabel="layer", ylabel=f"neurons at or\nbelow ε = {epsilon:.3g}")
    axis.yaxis.set_major_formatter(percent)
    axis.set_ylim(-0.03, max(0.05, cut.max() * 1.05))
    axis.legend(fontsize=8, ncols=2, frameon=True, edgecolor="none")


@drawn(names="domain other", maybe="jaccard chance")
def overlap_matrix(
    overlap: pd.DataFrame,
    *,
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
    if (np.diag(table) < 1).any():  # else a set is compared with itself
        caption = with_note(
            caption, "diagonal: two draws of one domain, the most that noise allows"
        )
    figure = new_figure(2.2 + 0.8 * cells, 1.5 + 0.62 * cells, caption, title)
    axis = figure.subplots()
    heat(axis, table, words, cmap="cividis", vmax=1, square=True,
         vmin=min(np.nanmin(chance), 0.99),
         cbar_kws={"label": f"Jaccard overlap\n{note}"})  # fmt: skip
    axis.tick_params(axis="x", rotation=30)
    axis.tick_params(axis="y", rotation=0)
    return figure


@drawn(names="domain", numbers="layer neuron mean_abs")
def magnitude_scatter(
    frame: pd.DataFrame, domain: str, other: str, *, epsilon: float | None = None, caption: str = ""
) -> Figure:
    """Each neuron's mean |activation| on one domain against another (Mini-GPTs, figure 3).

    Parameters
    ----------
    frame : pandas.DataFrame
        Columns ``domain, layer, neuron, mean_abs``.
    domain, other : str
        Horizontal and vertical axis.
    epsilon : float, optional
        Threshold to mark on both.
    caption : str
        Model, tokens.
    """
    wide = frame.pivot(index=["layer", "neuron"], columns="domain", values="mean_abs")
    live = (wide[[domain, other]] > 0).all(axis=1)
    across, up = wide.loc[live, domain], wide.loc[live, other]
    caption = with_note(caption, f"n = {len(across):,} neurons of all layers")
    figure = new_figure(4.8, 4.5, caption, "Is a neuron as active in the other domain?")
    axis = figure.subplots()
    drawn = axis.hexbin(across, up, xscale="log", yscale="log", gridsize=55,
                        bins="log", mincnt=1, cmap="cividis")  # fmt: skip
    figure.colorbar(drawn, ax=axis, label="neurons per cell")
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
    axis.set(xlabel=f"{MAGNITUDE} on {domain}", ylabel=f"{MAGNITUDE} on {other}")
    axis.text(0.97, 0.04, "\n".join(words), ha="right", fontsize=8, transform=axis.transAxes,
              bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8})  # fmt: skip
    return figure


@drawn(names="domain", numbers="tokens jaccard chance")
def calibration_curve(stability: pd.DataFrame, *, caption: str = "") -> Figure:
    """How soon the set of kept neurons settles as a domain's calibration text grows.

    Parameters
    ----------
    stability : pandas.DataFrame
        From `minigpt_lab.studies.analysis.calibration_stability`: columns ``domain, tokens,
        jaccard, chance``.
    caption : str
        Model, rule.
    """
    domains = list(dict.fromkeys(stability["domain"]))
    note = "sets of kept neurons; the last point of a line is the set it is compared with"
    title = "How much calibration text does a cut need?"
    figure = new_figure(6.4, 3.8, with_note(caption, note), title)
    axis = figure.subplots()
    for domain, rows in stability.groupby("domain", sort=False):
        tint, marker = style_for(domain, domains)
        axis.plot(rows["tokens"], rows["jaccard"], color=tint, marker=marker, ms=5, lw=1.3,
                  label=domain)  # fmt: skip
    chance = stability["chance"].mean()
    axis.axhline(chance, color="black", ls="--", lw=1, label=f"by chance {chance:.2f}")
    axis.set(xlabel="calibration tokens", ylabel="Jaccard overlap with the full set")
    axis.set_xscale("log")
    axis.set_xticks(sorted(set(stability["tokens"])))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_ylim(chance - 0.03 * (1 - chance), 1 + 0.03 * (1 - chance))
    figure.legend(loc="outside right upper", fontsize=8)
    return figure
