"""FFN activations: distributions per layer, drift with depth, overlap between domains."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator, StrMethodFormatter

from .axes import heat, layer_ticks, log_labels, log_ticks, percent, side_legend
from .frames import draws_frame
from .style import colour, new_figure, style_for, with_note

MAGNITUDE = "mean |activation| per token"


@draws_frame(names="domain", numbers="layer mean_abs")
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
    positive = frame.loc[frame["mean_abs"] > 0, "mean_abs"]
    # half a per cent lies far out, on two thirds of the scale: the last bin holds it
    highest = max(positive.quantile(0.995), epsilon or 0)
    edges = np.linspace(np.log10(positive.min()) - 0.1, np.log10(highest) + 0.1, 41)
    some_zero = len(positive) < len(frame)
    zero_at = edges[0] - 0.09 * np.ptp(edges)  # apart, left of the scale
    free = "right" if np.median(np.log10(positive)) < edges.mean() else "left"
    shown = frame[frame["layer"].isin(layers)].groupby(["layer", "domain"])["mean_abs"]
    counts = shown.size()
    neurons = "–".join(f"{count:,}" for count in sorted({counts.min(), counts.max()}))
    note = f"n = {neurons} neurons per layer and domain; the last bin holds all above"
    figure, axes = _layer_panels(len(layers), with_note(caption, note))
    for axis, layer in zip(axes, layers, strict=True):
        values = {domain: shown.get_group((layer, domain)).to_numpy() for domain in domains}
        for domain, own in values.items():
            tint, marker = style_for(domain, domains)
            _distribution(axis, own, edges, color=tint, marker=marker, label=domain)
        if some_zero:
            _zero_bars(axis, values, zero_at, np.ptp(edges))
        title = f"layer {layer}"
        if epsilon:
            dashed = {"color": "black", "ls": "--", "lw": 1, "label": f"ε = {epsilon:.3g}"}
            axis.axvline(np.log10(epsilon), **dashed)
            title += _shares_below(axis, values, epsilon, free)
        axis.set_title(title)
    axes[0].yaxis.set_major_formatter(percent)
    axes[0].yaxis.set_major_locator(MaxNLocator(3))
    axes[0].set_ylim(0, axes[0].get_ylim()[1])
    marks, words = log_ticks(10 ** edges[0], 10 ** edges[-1])
    zero = some_zero * [zero_at], some_zero * ["0"]
    axes[0].set_xticks([*zero[0], *np.log10(marks)], [*zero[1], *words])
    side_legend(figure, axes[0])
    return figure


def _layer_panels(count: int, caption: str) -> tuple[Figure, np.ndarray]:
    """A figure and its panels, in at most two rows."""
    columns = -(-count // 2) if count > 3 else count
    rows = -(-count // columns)
    title = "How strongly does each domain use the FFN's neurons?"
    figure = new_figure(2.9 * columns + 1.9, 2.3 * rows + 0.9, caption, title)
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for axis in axes[count:]:
        axis.set_visible(False)
    for axis in axes[count - columns : count]:
        axis.set_xlabel(MAGNITUDE)
        axis.tick_params(labelbottom=True)
    figure.supylabel("share of the layer's neurons", fontsize=9)
    return figure, axes[:count]


def _zero_bars(axis, values: dict[str, np.ndarray], zero_at: float, scale: float) -> None:
    """The share of neurons that are exactly zero, as bars of their own."""
    zeros = np.array([(own == 0).mean() for own in values.values()])
    width = 0.07 * scale / len(zeros)
    places = zero_at + width * (np.arange(len(zeros)) - len(zeros) / 2)
    tints = [colour(domain, list(values)) for domain in values]
    axis.bar(places, zeros, width, align="edge", color=tints)
    if zeros.any():
        shares = dict.fromkeys(f"{100 * share:.1f} %" for share in (zeros.min(), zeros.max()))
        above = {"xytext": (-4, 3), "textcoords": "offset points", "fontsize": 7.5}
        axis.annotate("never on:\n" + "–".join(shares), (zero_at, zeros.max()), **above)


def _distribution(axis, values: np.ndarray, edges: np.ndarray, **look) -> None:
    """Steps over the logs of the values that are not zero, a marker on each that holds some."""
    logs = np.minimum(np.log10(values[values > 0]), edges[-1])
    shares = np.histogram(logs, edges)[0] / len(values)
    look |= {"drawstyle": "steps-mid", "lw": 1.2, "ms": 3}
    marked = np.flatnonzero(shares > 0.01).tolist()
    axis.plot((edges[:-1] + edges[1:]) / 2, shares, markevery=marked, **look)


def _shares_below(axis, values: dict[str, np.ndarray], epsilon: float, side: str) -> str:
    """Write each domain's share at or below ε where there is room; return one domain's instead."""
    words = [f"{100 * (own <= epsilon).mean():.1f} %" for own in values.values()]
    if len(words) == 1:
        return f": {words[0]} at or below ε"
    names = [name if len(name) <= 12 else f"{name[:11]}…" for name in values]
    text = "\n".join(["at or below ε:", *map(" ".join, zip(names, words, strict=True))])
    place = 1 if side == "right" else 0.02
    axis.text(place, 1, text, transform=axis.transAxes, ha=side, va="top", fontsize=7)
    return ""


@draws_frame(names="domain", numbers="layer mean_abs")
def activation_depth(
    frame: pd.DataFrame, *, epsilon: float | None = None, caption: str = ""
) -> Figure:
    """Scale of mean |activation| by depth, and the share of each layer that one ε would prune.

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
    groups = frame.groupby(["domain", "layer"])["mean_abs"]
    bands = groups.quantile([0.01, 0.1, 0.5, 0.9, 0.99]).unstack()
    columns = min(len(domains), 3)
    rows = -(-len(domains) // columns)
    title = "How does the scale drift with depth, and what would one ε prune?"
    count = f"{len(frame) // groups.ngroups:,}"
    note = f"line: median neuron; bands: the middle 80 % and 98 % of a layer's n = {count} neurons"
    below = epsilon is not None
    width, height = 2.6 * max(columns, 2) + 1.2, 1.9 * rows + 2.2 * below + 0.6
    figure = new_figure(width, height, with_note(caption, note), title)
    grid = figure.add_gridspec(rows + below, columns, height_ratios=[1] * rows + [1.1] * below)
    first = None
    for place, domain in enumerate(domains):
        axis = figure.add_subplot(grid[divmod(place, columns)], sharex=first, sharey=first)
        first = first or axis
        _depth_bands(axis, bands.loc[domain], colour(domain, domains))
        if below:
            axis.axhline(epsilon, color="black", ls="--", lw=1)
        axis.set_title(domain)
        axis.label_outer()
        if place % columns == 0:
            axis.set_ylabel("mean |activation|")
        if place >= len(domains) - columns:
            axis.set_xlabel("layer")
            axis.tick_params(labelbottom=True)
    first.set_yscale("log", nonpositive="clip")
    positive = bands.to_numpy()[bands > 0]
    log_labels(first.yaxis, positive)
    first.set_ylim(positive.min() / 1.2, positive.max() * 1.2)
    layer_ticks(first, layers, room=12)
    if below:
        axis = figure.add_subplot(grid[rows, :])
        _shares_by_depth(axis, frame, domains, epsilon)
        layer_ticks(axis, layers, room=int(4.4 * width))
    return figure


def _depth_bands(axis, bands: pd.DataFrame, tint: str) -> None:
    """Median and two bands of a domain's layers."""
    bands = bands.clip(lower=np.nextafter(0, 1))
    for low, high, alpha in ((0.01, 0.99, 0.18), (0.1, 0.9, 0.35)):
        axis.fill_between(bands.index, bands[low], bands[high], color=tint, alpha=alpha, lw=0)
    axis.plot(bands.index, bands[0.5], color=tint, lw=1.6)


def _shares_by_depth(axis, frame: pd.DataFrame, domains: list[str], epsilon: float) -> None:
    """Share of each layer at or below ε, a line per domain."""
    shares = (frame["mean_abs"] <= epsilon).groupby([frame["domain"], frame["layer"]]).mean()
    for domain in domains:
        tint, marker = style_for(domain, domains)
        own = shares.loc[domain]
        axis.plot(own.index, own, color=tint, marker=marker, ms=4, lw=1.2, label=domain)
    axis.set(xlabel="layer", ylabel=f"neurons at or\nbelow ε = {epsilon:.3g}")
    axis.yaxis.set_major_formatter(percent)
    axis.set_ylim(-0.03, max(0.05, shares.max() * 1.05))
    axis.legend(ncols=2, frameon=True, edgecolor="none")


@draws_frame(names="domain other", maybe="jaccard chance")
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
    order = list(overlap["domain"].unique())
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
    scale = {"cmap": "cividis", "vmin": min(np.nanmin(chance), 0.99), "vmax": 1}
    heat(axis, table, words, square=True, cbar_kws={"label": f"Jaccard overlap\n{note}"}, **scale)
    axis.tick_params(axis="x", rotation=30)
    axis.tick_params(axis="y", rotation=0)
    return figure


@draws_frame(names="domain", numbers="layer neuron mean_abs")
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
    x, y = wide.loc[live, domain], wide.loc[live, other]
    caption = with_note(caption, f"n = {len(x):,} neurons of all layers")
    figure = new_figure(4.8, 4.5, caption, "Is a neuron as active in the other domain?")
    axis = figure.subplots()
    cells = {"gridsize": 55, "bins": "log", "mincnt": 1, "cmap": "cividis"}
    image = axis.hexbin(x, y, xscale="log", yscale="log", **cells)
    figure.colorbar(image, ax=axis, label="neurons per cell")
    low, high = min(x.min(), y.min()), max(x.max(), y.max())
    axis.plot([low, high], [low, high], color="black", lw=0.8, label="equally active")
    if epsilon:
        dashed = {"color": "black", "ls": "--", "lw": 1}
        axis.axvline(epsilon, label=f"ε = {epsilon:.3g}", **dashed)
        axis.axhline(epsilon, **dashed)
        low, high = min(low, epsilon), max(high, epsilon)
    for side in (axis.xaxis, axis.yaxis):
        side.set_ticks(*log_ticks(low, high))
        side.set_minor_locator(NullLocator())
    axis.legend(loc="upper left", frameon=True, edgecolor="none")
    axis.set(xlabel=f"{MAGNITUDE} on {domain}", ylabel=f"{MAGNITUDE} on {other}")
    words = f"correlation of logs {np.log(x).corr(np.log(y)):.2f}"
    if not live.all():
        words += f"\nnot drawn: {(~live).sum():,} of {len(live):,},\nnever on in one or both"
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8}
    axis.text(0.97, 0.04, words, ha="right", fontsize=8, transform=axis.transAxes, bbox=box)
    return figure


@draws_frame(names="domain", numbers="tokens jaccard chance")
def calibration_curve(stability: pd.DataFrame, *, caption: str = "") -> Figure:
    """Overlap of the set of kept neurons with the final one, by the amount of calibration text.

    Parameters
    ----------
    stability : pandas.DataFrame
        From `minigpt_lab.studies.calibration_stability`: columns ``domain, tokens,
        jaccard, chance``.
    caption : str
        Model, rule.
    """
    domains = list(stability["domain"].unique())
    note = "sets of kept neurons; the last point of a line is the set it is compared with"
    title = "How much calibration text does pruning need?"
    figure = new_figure(6.4, 3.8, with_note(caption, note), title)
    axis = figure.subplots()
    for domain, rows in stability.groupby("domain", sort=False):
        tint, marker = style_for(domain, domains)
        look = {"color": tint, "marker": marker, "ms": 5, "lw": 1.3, "label": domain}
        axis.plot(rows["tokens"], rows["jaccard"], **look)
    chance = stability["chance"].mean()
    axis.axhline(chance, color="black", ls="--", lw=1, label=f"by chance {chance:.2f}")
    axis.set(xlabel="calibration tokens", ylabel="Jaccard overlap with the full set")
    axis.set_xscale("log")
    axis.set_xticks(sorted(set(stability["tokens"])))
    axis.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_ylim(chance - 0.03 * (1 - chance), 1 + 0.03 * (1 - chance))
    side_legend(figure)
    return figure
