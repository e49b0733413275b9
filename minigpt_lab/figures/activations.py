"""FFN activations: distributions per layer, drift with depth, overlap between domains."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from .axes import group_lines, heat, layer_ticks, log_labels, log_ticks, percent, side_legend
from .frames import draws_frame
from .style import looks, new_figure, with_note

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
    rows = 1 if len(layers) <= 3 else 2
    columns = -(-len(layers) // rows)
    counts = frame.groupby(["layer", "domain"]).size()
    neurons = "–".join(f"{count:,}" for count in sorted({counts.min(), counts.max()}))
    note = f"n = {neurons} neurons per layer and domain; the last step holds all above"
    title = "How strongly does each domain use the FFN's neurons?"
    size = (2.9 * columns + 1.9, 2.3 * rows + 0.9)
    figure = new_figure(*size, with_note(caption, note), title)
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()

    positive = frame.loc[frame["mean_abs"] > 0, "mean_abs"]
    # half a per cent lies far out, on two thirds of the scale: the last step holds it
    highest = max(positive.quantile(0.995), epsilon or 0)
    edges = np.linspace(np.log10(positive.min()) - 0.1, np.log10(highest) + 0.1, 41)
    free = "right" if np.median(np.log10(positive)) < edges.mean() else "left"
    styles = looks(frame["domain"])
    for axis, layer in zip(axes, layers, strict=False):
        values = frame[frame["layer"] == layer].set_index("domain")["mean_abs"]
        for name, own in values.groupby(level="domain", sort=False):
            _distribution(axis, own, edges, label=name, **styles[name])
        _shares(axis, values, epsilon, free)
        if epsilon:
            dashed = {"color": "black", "ls": "--", "lw": 1, "label": f"ε = {epsilon:.3g}"}
            axis.axvline(np.log10(epsilon), **dashed)
        axis.set_title(f"layer {layer}")
    for axis in axes[len(layers) :]:
        axis.set_visible(False)
    for axis in axes[len(layers) - columns : len(layers)]:
        axis.set_xlabel(MAGNITUDE)
        axis.tick_params(labelbottom=True)
    figure.supylabel("share of the layer's neurons", fontsize=9)
    axes[0].yaxis.set_major_formatter(percent)
    axes[0].yaxis.set_major_locator(MaxNLocator(3))
    axes[0].set_ylim(bottom=0)
    marks, words = log_ticks(10 ** edges[0], 10 ** edges[-1])
    axes[0].set_xticks(np.log10(marks), words)
    side_legend(figure)
    return figure


def _distribution(axis: Axes, values: pd.Series, edges: np.ndarray, **look) -> None:
    """Steps over the logs of the values that are not zero, a marker on each that holds some."""
    logs = np.minimum(np.log10(values[values > 0]), edges[-1])
    shares = np.histogram(logs, edges)[0] / len(values)
    marked = np.flatnonzero(shares > 0.01).tolist()
    steps = {"drawstyle": "steps-mid", "lw": 1.2, "ms": 3, "markevery": marked}
    axis.plot((edges[:-1] + edges[1:]) / 2, shares, **steps, **look)


def _shares(axis: Axes, values: pd.Series, epsilon: float | None, side: str) -> None:
    """Write each domain's shares at or below ε, and at zero, where there is room."""
    levels = {}
    if epsilon:
        levels["≤ ε"] = epsilon
    if (values == 0).any():
        levels["never on"] = 0
    if not levels:
        return
    lines = [f"% {' / '.join(levels)}:"]
    for name, own in values.groupby(level="domain", sort=False):
        shares = [f"{100 * (own <= level).mean():.1f}" for level in levels.values()]
        lines.append(f"{name:.12} {' / '.join(shares)}")
    place = {"x": 1 if side == "right" else 0.02, "y": 1, "ha": side, "va": "top"}
    axis.text(s="\n".join(lines), transform=axis.transAxes, fontsize=7, **place)


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
    styles, layers = looks(frame["domain"]), int(frame["layer"].max()) + 1
    groups = frame.groupby(["domain", "layer"])["mean_abs"]
    bands = groups.quantile([0.01, 0.1, 0.5, 0.9, 0.99]).unstack()
    columns = min(len(styles), 3)
    rows, below = -(-len(styles) // columns), epsilon is not None
    title = "How does the scale drift with depth, and what would one ε prune?"
    count = f"{len(frame) // groups.ngroups:,}"
    note = f"line: median neuron; bands: the middle 80 % and 98 % of a layer's n = {count} neurons"
    width, height = 2.6 * max(columns, 2) + 1.2, 1.9 * rows + 2.2 * below + 0.6
    figure = new_figure(width, height, with_note(caption, note), title)
    grid = figure.add_gridspec(rows + below, columns, height_ratios=[1] * rows + [1.1] * below)
    first = figure.add_subplot(grid[0, 0])
    for place, (name, look) in enumerate(styles.items()):
        at = grid[divmod(place, columns)]
        axis = figure.add_subplot(at, sharex=first, sharey=first) if place else first
        _depth_bands(axis, bands.loc[name], look["color"])
        if below:
            axis.axhline(epsilon, color="black", ls="--", lw=1)
        axis.set(title=name, xlabel="layer", ylabel="mean |activation|")
        axis.label_outer()
        if place + columns >= len(styles):  # none stands below it
            axis.set_xlabel("layer")
            axis.tick_params(labelbottom=True)
    first.set_yscale("log", nonpositive="clip")
    positive = bands.to_numpy()[bands > 0]
    log_labels(first.yaxis, positive)
    first.set_ylim(positive.min() / 1.2, positive.max() * 1.2)
    layer_ticks(first, layers, room=12)
    if below:
        shares = frame.assign(share=frame["mean_abs"] <= epsilon)
        shares = shares.groupby(["domain", "layer"], as_index=False)["share"].mean()
        axis = figure.add_subplot(grid[rows, :])
        group_lines(axis, shares, "layer", "share", styles, by="domain")
        axis.set(xlabel="layer", ylabel=f"neurons at or\nbelow ε = {epsilon:.3g}")
        axis.yaxis.set_major_formatter(percent)
        axis.set_ylim(-0.03, max(0.05, shares["share"].max() * 1.05))
        axis.legend(ncols=2, frameon=True, edgecolor="none")
        layer_ticks(axis, layers, room=int(4.4 * width))
    return figure


def _depth_bands(axis: Axes, bands: pd.DataFrame, tint: str) -> None:
    """Median and two bands of a domain's layers."""
    bands = bands.clip(lower=np.nextafter(0, 1))
    for low, high, alpha in ((0.01, 0.99, 0.18), (0.1, 0.9, 0.35)):
        axis.fill_between(bands.index, bands[low], bands[high], color=tint, alpha=alpha, lw=0)
    axis.plot(bands.index, bands[0.5], color=tint, lw=1.6)


@draws_frame(names="domain other", numbers="jaccard chance")
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
        Columns ``domain, other, jaccard, chance``; the diagonal compares two samples of one domain.
    caption : str
        Model, tokens, rule.
    title : str
        The question, if the sets are others than the unused neurons.
    """
    order = list(overlap["domain"].unique())
    wide = overlap.pivot(index="domain", columns="other")
    table, chance = (wide[name].loc[order, order] for name in ("jaccard", "chance"))
    words, note = table.map("{:.2f}".format), f"by chance {np.nanmean(chance):.2f}"
    if np.ptp(chance.to_numpy()) > 0.01:  # an absolute ε gives each pair a level of its own
        words, note = words + chance.map("\n({:.2f})".format), "in brackets: by chance"
    if (np.diag(table) < 1).any():  # else a set is compared with itself
        about = "diagonal: two samples of one domain, the most that noise allows"
        caption = with_note(caption, about)
    if table.isna().any(axis=None):
        caption = with_note(caption, "empty: no neuron is unused there; choose a larger ε")
    cells = max(len(order), 3)  # room for the words around them
    figure = new_figure(2.2 + 0.8 * cells, 1.5 + 0.62 * cells, caption, title)
    bar = {"label": f"Jaccard overlap\n({note})"}
    scale = {"cmap": "cividis", "vmin": min(np.nanmin(chance), 0.99), "vmax": 1}
    heat(figure.subplots(), table, words, square=True, cbar_kws=bar, **scale)
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
    ends = [min(x.min(), y.min()), max(x.max(), y.max())]
    axis.plot(ends, ends, color="black", lw=0.8, label="equally active")
    if epsilon:
        dashed = {"color": "black", "ls": "--", "lw": 1}
        axis.axvline(epsilon, label=f"ε = {epsilon:.3g}", **dashed)
        axis.axhline(epsilon, **dashed)
    for side in (axis.xaxis, axis.yaxis):
        side.set_ticks(*log_ticks(min(*ends, epsilon or ends[0]), max(*ends, epsilon or 0)))
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
    note = "sets of kept neurons; the last point of a line is the set it is compared with"
    title = "How much calibration text does pruning need?"
    figure = new_figure(6.4, 3.8, with_note(caption, note), title)
    axis = figure.subplots()
    group_lines(axis, stability, "tokens", "jaccard", looks(stability["domain"]), by="domain")
    chance = stability["chance"].mean()
    axis.axhline(chance, color="black", ls="--", lw=1, label=f"by chance {chance:.2f}")
    axis.set(xlabel="calibration tokens", ylabel="Jaccard overlap with the full set", xscale="log")
    amounts = sorted(set(stability["tokens"]))
    axis.set_xticks(amounts, [f"{amount:,}" for amount in amounts])
    axis.minorticks_off()
    axis.set_ylim(chance - 0.03 * (1 - chance), 1 + 0.03 * (1 - chance))
    side_legend(figure)
    return figure
