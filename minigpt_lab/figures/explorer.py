"""The explorer's picture: a static background per domain, and the few marks that a slider moves.

Drawing all of it anew (six panels with their ticks and texts) would take 0.4 s on one core, against
0.03 s for the marks (`tests/benchmarks/explorer_latency.py`): matplotlib's blitting.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle, StepPatch
from matplotlib.ticker import MaxNLocator
from PIL import Image

from ..checks import DictOf, Instance, Text, checked
from ..models import Size
from ..studies import COMPONENTS, Magnitudes, Reading
from .axes import group_lines, log_ticks, percent
from .style import PART_STYLE, STYLE, looks

_UNITS = {
    "linear": "mean |input|, |output|",
    "activation": "mean |activation|",
    "embedding": "token's share of the text",
}
_COMPONENTS = {
    "linear": {"color": "#E69F00", "marker": "s", "ls": "--"},
    "activation": {"color": "#0072B2", "marker": "o", "ls": "-"},
    "embedding": {"color": "#009E73", "marker": "^", "ls": ":"},
    "all": {"color": "#000000", "marker": "D", "ls": "-."},
}
_SMALL = {**STYLE, "font.size": 8, "axes.titlesize": 8.5, "axes.titleweight": "bold"}
_MARGINS = {"left": 0.07, "right": 0.972, "top": 0.94, "bottom": 0.125, "hspace": 0.46}


class ThresholdPicture:
    """Place of ε among the neurons of a domain, what it removes of each layer, and its cost.

    Parameters
    ----------
    magnitudes : mapping
        Domain to its `Magnitudes`; all domains share the scales, so that they compare.
    domain : str
        The one that is drawn.
    sweep : pandas.DataFrame, optional
        Its `threshold_sweep`; draws the curves, and the reading at ε on them.
    """

    @checked(
        magnitudes=DictOf(Text(), Instance(Magnitudes), 1), sweep=Instance(pd.DataFrame) | None
    )
    def __init__(
        self,
        magnitudes: Mapping[str, Magnitudes],
        domain: str,
        *,
        sweep: pd.DataFrame | None = None,
    ):
        own, tint = magnitudes[domain], looks(magnitudes)[domain]["color"]
        self._edges = {name: _bin_edges(magnitudes, name) for name in COMPONENTS}
        self._stars: dict[str, Line2D] = {}
        self._sizes: list[Rectangle] = []
        with mpl.rc_context(_SMALL):
            self.figure = Figure(figsize=(9.6, 5.4), dpi=100)
            layout = {"height_ratios": (1, 1.5), "wspace": 0.32, **_MARGINS}
            above, (depth, removed, third) = self.figure.subplots(2, 3, gridspec_kw=layout)
            self._lines = {
                name: _histogram(axis, name, own.pooled[name], self._edges[name], tint)
                for axis, name in zip(above, COMPONENTS, strict=True)
            }
            self._steps = _layer_density(depth, own.layers, self._edges["activation"])
            self._bars = _removed_shares(removed, len(own.layers))
            if sweep is None:
                self._sizes = _size_bars(third)
            else:
                self._stars = _sweep_curves(third, sweep)
            caption = f"{own.statistics.model_name}; {domain}: {own.statistics.n_tokens:,} "
            caption += "calibration tokens; one scale for all domains"
            grey = {"fontsize": 7.5, "color": "#555555", "parse_math": False}
            self.figure.text(0.01, 0.012, caption, **grey)
            self._moving = [*self._lines.values(), self._steps, *self._bars.values()]
            self._moving += [removed.get_legend(), *self._stars.values(), *self._sizes]
            for artist in self._moving:
                artist.set_animated(True)  # not part of the background
            self._canvas = FigureCanvasAgg(self.figure)
            self._canvas.draw()
        self._background = self._canvas.copy_from_bbox(self.figure.bbox)

    def draw(
        self,
        thresholds: Mapping[str, Any],
        *,
        removed: pd.DataFrame,
        size: Size,
        readings: Mapping[str, Reading | None],
    ) -> bytes:
        """Draw one choice of thresholds as PNG.

        Parameters
        ----------
        thresholds : mapping
            Component to its ε, for activations one per layer ``[layer]``; None where all of it is
            kept or (linear layers) has an ε of its own in every place.
        removed : pandas.DataFrame
            `PruningPlan.to_frame`.
        size : Size
            Predicted for that plan.
        readings : mapping
            Component to its `Reading` of the sweep.
        """
        # what is not a number is not drawn
        chosen = {
            name: np.atleast_1d(np.nan if thresholds.get(name) is None else thresholds[name])
            for name in COMPONENTS
        }
        for name, line in self._lines.items():
            one = chosen[name][0] if np.ptp(chosen[name]) == 0 else np.nan
            zero_at = self._edges[name][0] - 0.02 * np.ptp(self._edges[name])
            place = np.log10(one) if one != 0 else zero_at
            line.set_xdata([place, place])
        layers = len(self._bars["ffn"].get_data().values)
        with np.errstate(divide="ignore"):
            across = np.log10(np.broadcast_to(chosen["activation"], layers))
        self._steps.set_data(across.repeat(2), (np.arange(layers + 1) - 0.5).repeat(2)[1:-1])
        for site, bars in self._bars.items():
            rows = removed[removed["site"] == site]
            bars.set_data((rows["removed"] / rows["units"]).to_numpy())
        for name, star in self._stars.items():
            reading = readings.get(name)
            star.set_data(chosen[name][:1], [reading.value if reading else np.nan])
        shares = [size.stored / size.dense, size.nonzero / size.dense]
        shares += [size.layers_stored / size.layers_dense]
        for bar, share in zip(self._sizes, shares, strict=False):
            bar.set_width(share)

        self._canvas.restore_region(self._background)
        for artist in self._moving:
            artist.axes.draw_artist(artist)
        buffer = io.BytesIO()
        image = Image.fromarray(np.asarray(self._canvas.buffer_rgba())).convert("RGB")
        image.save(buffer, format="png", compress_level=1)
        return buffer.getvalue()


def _bin_edges(magnitudes: Mapping[str, Magnitudes], component: str) -> np.ndarray:
    """Bin edges (log10) over a component's magnitudes above zero, in all domains."""
    values = np.concatenate([each.pooled[component] for each in magnitudes.values()])
    logs = np.log10(values[values > 0])
    return np.linspace(logs.min() - 0.1, logs.max() + 0.1, 61)


def _histogram(
    axis: Axes, component: str, values: np.ndarray, edges: np.ndarray, tint: str
) -> Line2D:
    """Distribution of the logs of `values`, and a bar of zeros; returns the line of ε."""
    width, positive = np.ptp(edges), values[values > 0]
    zero_at, zeros = edges[0] - 0.06 * width, 1 - len(positive) / len(values)
    shares = np.histogram(np.log10(positive), edges)[0] / len(values)
    axis.stairs(shares, edges, fill=True, alpha=0.55, color=tint)
    axis.bar([zero_at], [zeros], 0.05 * width, color=tint)
    axis.set_xlim(edges[0] - 0.1 * width, edges[-1])
    # a bar of zeros may be ten times as high as all the rest: its number stands beside it
    axis.set_ylim(0, 1.25 * shares.max())
    if zeros:
        place = {"transform": axis.transAxes, "va": "top", "fontsize": 7}
        axis.text(0.085, 0.97, f"exactly 0: {zeros:.1%}", **place)
    _log_axis(axis, edges, zero_at=zero_at)
    axis.yaxis.set_major_formatter(percent)
    axis.yaxis.set_major_locator(MaxNLocator(4))
    axis.set_xlabel(_UNITS[component])
    what = "tokens" if component == "embedding" else "neurons"
    axis.set_title(f"{component}: {len(values):,} {what}")
    return axis.axvline(edges[0], color="black", ls="--", lw=1.2)


def _layer_density(axis: Axes, layers: Sequence[np.ndarray], edges: np.ndarray) -> Line2D:
    """Distribution of each layer's activations as an image; returns the line of ε."""
    with np.errstate(divide="ignore"):
        density = np.stack([np.histogram(np.log10(v), edges)[0] / len(v) for v in layers])
    extent = (edges[0], edges[-1], len(layers) - 0.5, -0.5)
    look = {"aspect": "auto", "cmap": "cividis", "interpolation": "none"}
    axis.imshow(density, extent=extent, vmin=0, vmax=np.quantile(density, 0.995) or 1, **look)
    _log_axis(axis, edges)
    axis.set(xlabel=_UNITS["activation"], ylabel="layer")
    axis.set_title("Where does each layer lie?")
    axis.yaxis.set_major_locator(MaxNLocator(8, integer=True))
    axis.grid(False)
    (line,) = axis.plot([], [], color="black", ls="--", lw=1.6, gapcolor="white")
    return line


def _removed_shares(axis: Axes, layers: int) -> dict[str, StepPatch]:
    """Empty bars of the share that is removed of each layer, by site."""
    edges, empty = np.arange(layers + 1) - 0.5, np.zeros(layers)
    looks = {
        "ffn": {"fill": True, "alpha": 0.75, "label": "FFN channels"},
        "attention": {"lw": 1.6, "label": "heads (groups)"},
    }
    bars = {
        site: axis.stairs(empty, edges, orientation="horizontal", color=PART_STYLE[site][0], **look)
        for site, look in looks.items()
    }
    axis.set(xlim=(0, 1), ylim=(layers - 0.5, -0.5), xlabel="share removed", ylabel="layer")
    axis.set_title("Which layers lose what?")
    axis.xaxis.set_major_formatter(percent)
    axis.yaxis.set_major_locator(MaxNLocator(8, integer=True))
    axis.legend(loc="lower right", fontsize=7)
    return bars


def _size_bars(axis: Axes) -> list[Rectangle]:
    """Bars of the three sizes."""
    names = ("stored", "non-zero", "layers")  # short: the next panel is near
    bars = axis.barh(names, [1, 1, 1], color=PART_STYLE["ffn"][0], height=0.5)
    axis.set(xlim=(0, 1), ylim=(2.6, -0.6), xlabel="share of the dense model's parameters")
    axis.set_title("How large is the pruned model?")
    axis.tick_params(axis="y", labelsize=7)
    axis.xaxis.set_major_formatter(percent)
    return list(bars)


def _sweep_curves(axis: Axes, sweep: pd.DataFrame) -> dict[str, Line2D]:
    """Curves of a sweep; returns the star of each component's reading."""
    points = sweep[(sweep["method"] == "contextual") & (sweep["epsilon"] > 0)]
    group_lines(axis, points, "epsilon", "perplexity_ratio", _COMPONENTS, by="component", ms=3.5)
    stars = {}
    for component in points["component"].drop_duplicates().loc[lambda name: name != "all"]:
        tint = _COMPONENTS[component]["color"]
        (stars[component],) = axis.plot([], [], "*", ms=13, color=tint, mec="black")
    axis.axhline(1, color="black", lw=0.8)
    axis.set(xscale="log", yscale="log", xlabel="ε", ylabel="validation perplexity ÷ dense")
    axis.set_title("What does it cost? (from the sweep)")
    axis.set_yticks(*log_ticks(0.9, max(2.0, 1.1 * points["perplexity_ratio"].max())))
    axis.minorticks_off()
    axis.legend(loc="upper left", fontsize=7)
    return stars


def _log_axis(axis: Axes, edges: np.ndarray, zero_at: float | None = None) -> None:
    """Whole powers of ten on an axis of logarithms, and a place for zero beside them."""
    powers = np.arange(np.ceil(edges[0] + 0.05 * np.ptp(edges)), np.floor(edges[-1]) + 1)
    words = [f"{10.0**power:g}" if -3 <= power <= 3 else f"1e{power:.0f}" for power in powers]
    zero = [] if zero_at is None else [zero_at]
    axis.set_xticks([*zero, *powers], ["0"] * len(zero) + words)
