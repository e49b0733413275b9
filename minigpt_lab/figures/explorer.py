"""The explorer's picture: built once, then only what moved is drawn, so that a slider is quick."""

from __future__ import annotations

import io
from collections.abc import Mapping

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter
from PIL import Image

from ..checks import DictOf, Instance, Text, checked
from ..models import Size
from ..studies import COMPONENTS, Magnitudes, Reading
from .style import COMPONENT_STYLE, PART_STYLE, STYLE, colour, log_ticks

_UNITS = {
    "linear": "mean |input|, |output|",
    "activation": "mean |activation|",
    "embedding": "token's share of the text",
}
_BINS = 60
_LOOK = {**STYLE, "font.size": 8, "axes.titlesize": 8.5}
_SIZES = ("stored", "non-zero", "layers")  # short: the next panel is near


class ThresholdPicture:
    """Where ε falls among the neurons of a domain, which layers lose what, what a sweep measured.

    Parameters
    ----------
    magnitudes : mapping
        Domain to its `Magnitudes`; all domains share the scales, so that they compare.
    sweeps : mapping, optional
        Domain to its `threshold_sweep`; draws the curves, and the reading at ε on them.
    """

    @checked(
        magnitudes=DictOf(Text(), Instance(Magnitudes), 1),
        sweeps=DictOf(Text(), Instance(pd.DataFrame)) | None,
    )
    def __init__(
        self,
        magnitudes: Mapping[str, Magnitudes],
        sweeps: Mapping[str, pd.DataFrame] | None = None,
    ):
        self.magnitudes, self.sweeps = dict(magnitudes), dict(sweeps or {})
        self._edges = {name: self._bins(name) for name in COMPONENTS}
        self._domain = ""
        self._backgrounds: dict[str, object] = {}  # domain to the drawing without what moves
        with mpl.rc_context(_LOOK):
            self.figure = Figure(figsize=(9.6, 5.4), dpi=100)
            self._canvas = FigureCanvasAgg(self.figure)
            grid = self.figure.add_gridspec(
                2, 3, left=0.07, right=0.972, top=0.94, bottom=0.125, hspace=0.46, wspace=0.32,
                height_ratios=(1, 1.5),
            )  # fmt: skip
            self._histograms = {
                name: self._histogram(self.figure.add_subplot(grid[0, place]), name)
                for place, name in enumerate(COMPONENTS)
            }
            self._depth(self.figure.add_subplot(grid[1, 0]))
            self._leaving(self.figure.add_subplot(grid[1, 1]))
            self._caption = self.figure.text(
                0.01, 0.012, "", fontsize=7.5, color="#555555", parse_math=False
            )
            self._third = self.figure.add_subplot(grid[1, 2])
        self._marks: dict[str, Line2D] = {}
        self._sizes: dict[str, Rectangle] = {}

    @property
    def _moving(self) -> list[Artist]:
        """What changes without a new domain."""
        lines = [parts["line"] for parts in self._histograms.values()]
        paths = [self._path, self._path_core, *self._bars.values(), self._legend]
        return [*lines, *paths, *self._marks.values(), *self._sizes.values()]

    def _bins(self, component: str) -> np.ndarray:
        """Bin edges (log10) over all domains' magnitudes above zero."""
        live = [found.pooled[component] for found in self.magnitudes.values()]
        live = np.concatenate([values[values > 0] for values in live])
        ends = (live.min(), live.max()) if len(live) else (1e-6, 1.0)
        return np.linspace(np.log10(ends[0]) - 0.1, np.log10(ends[1]) + 0.1, _BINS + 1)

    def _histogram(self, axis: Axes, component: str) -> dict:
        edges = self._edges[component]
        width = np.ptp(edges)
        axis.set_xlim(edges[0] - 0.1 * width, edges[-1])
        _log_axis(axis, edges, zero_at=edges[0] - 0.06 * width)
        axis.set_xlabel(_UNITS[component])
        axis.yaxis.set_major_formatter(PercentFormatter(1))
        axis.yaxis.set_major_locator(MaxNLocator(4))
        never = axis.bar([edges[0] - 0.06 * width], [0], 0.05 * width)[0]
        return {
            "axis": axis,
            "steps": axis.stairs(np.zeros(_BINS), edges, fill=True, alpha=0.55),
            "never": never,
            "line": axis.axvline(edges[0], color="black", ls="--", lw=1.2),
            # right of the bar of zeros, which may be as high as the panel
            "note": axis.text(0.085, 0.97, "", transform=axis.transAxes, va="top", fontsize=7),
        }

    def _depth(self, axis: Axes) -> None:
        layers = len(next(iter(self.magnitudes.values())).layers)
        edges = self._edges["activation"]
        self._image = axis.imshow(
            np.zeros((layers, _BINS)), aspect="auto", cmap="cividis", vmin=0, interpolation="none",
            extent=(edges[0], edges[-1], layers - 0.5, -0.5),
        )  # fmt: skip
        self._path = axis.plot([], [], color="white", lw=2.5)[0]
        self._path_core = axis.plot([], [], color="black", ls="--", lw=1.2)[0]
        _log_axis(axis, edges)
        axis.set(xlabel=_UNITS["activation"], ylabel="layer")
        axis.set_title("Where does each layer lie?")
        axis.yaxis.set_major_locator(MaxNLocator(8, integer=True))
        axis.grid(False)

    def _leaving(self, axis: Axes) -> None:
        layers = len(next(iter(self.magnitudes.values())).layers)
        edges, empty = np.arange(layers + 1) - 0.5, np.zeros(layers)
        self._bars = {
            "ffn": axis.stairs(empty, edges, orientation="horizontal", fill=True, alpha=0.75,
                               color=PART_STYLE["ffn"][0], label="FFN channels"),
            "attention": axis.stairs(empty, edges, orientation="horizontal", lw=1.6,
                                     color=PART_STYLE["attention"][0], label="heads (groups)"),
        }  # fmt: skip
        axis.set(xlim=(0, 1), ylim=(layers - 0.5, -0.5), xlabel="share that leaves", ylabel="layer")
        axis.set_title("Which layers lose what?")
        axis.xaxis.set_major_formatter(PercentFormatter(1, 0))
        axis.yaxis.set_major_locator(MaxNLocator(8, integer=True))
        self._legend = axis.legend(loc="lower right", fontsize=7)

    def _sizing(self, axis: Axes) -> None:
        bars = axis.barh(_SIZES, [1, 1, 1], color=[PART_STYLE["ffn"][0]] * 3, height=0.5)
        self._sizes = dict(zip(_SIZES, bars, strict=True))
        axis.set(xlim=(0, 1), ylim=(2.6, -0.6), xlabel="share of the dense model's parameters")
        axis.set_title("How large is what stays?")
        axis.tick_params(axis="y", labelsize=7)
        axis.xaxis.set_major_formatter(PercentFormatter(1, 0))

    def _losses(self, axis: Axes, sweep: pd.DataFrame) -> None:
        axis.set_title("What does it cost? (from the sweep)")
        points = sweep[(sweep["method"] == "contextual") & (sweep["epsilon"] > 0)]
        for component, rows in points.groupby("component", sort=False):
            tint, marker, line = COMPONENT_STYLE[component]
            axis.plot(rows["epsilon"], rows["perplexity_ratio"], color=tint, marker=marker, ms=3.5,
                      ls=line, label=component)  # fmt: skip
            if component in COMPONENTS:
                self._marks[component] = axis.plot([], [], "*", ms=13, color=tint, mec="black")[0]
        axis.axhline(1, color="black", lw=0.8)
        axis.set(xscale="log", yscale="log", xlabel="ε", ylabel="validation perplexity ÷ dense")
        axis.set_yticks(*log_ticks(0.9, max(2.0, 1.1 * points["perplexity_ratio"].max())))
        axis.minorticks_off()
        axis.legend(loc="upper left", fontsize=7)

    def draw(
        self,
        domain: str,
        thresholds: Mapping[str, float | np.ndarray | None],
        removed: pd.DataFrame,
        size: Size,
        readings: Mapping[str, Reading | None],
    ) -> Figure:
        """Change the picture to one choice.

        Parameters
        ----------
        domain : str
            One of the mapping's.
        thresholds : mapping
            Component to its ε, for activations one per layer ``[layer]``; None where it stays whole
            or (linear layers) has an ε of its own in every place.
        removed : pandas.DataFrame
            `PruningPlan.frame`.
        size : Size
            Predicted for that plan.
        readings : mapping
            Component to what the sweep says there.
        """
        if domain != self._domain:
            with mpl.rc_context(_LOOK):
                self._show_domain(domain)
        for name, parts in self._histograms.items():
            values = thresholds.get(name)
            chosen = np.atleast_1d(np.nan if values is None else values)
            same = np.ptp(chosen) == 0
            parts["line"].set_visible(bool(same))
            if same:
                parts["line"].set_xdata([self._place(name, chosen[0])] * 2)
        layers = len(self._image.get_array())
        values = thresholds.get("activation")
        steps = np.full(layers, np.nan if values is None else values, float)
        with np.errstate(divide="ignore"):
            path = np.repeat(np.log10(steps), 2), np.repeat(np.arange(layers + 1) - 0.5, 2)[1:-1]
        self._path.set_data(*path)
        self._path_core.set_data(*path)
        for site, bars in self._bars.items():
            rows = removed[removed["site"] == site]
            bars.set_data((rows["removed"] / rows["units"]).to_numpy())
        for name, mark in self._marks.items():
            reading, value = readings.get(name), thresholds.get(name)
            known = reading is not None and np.ndim(value) == 0
            mark.set_data(([value], [reading.value]) if known else ([], []))
        whole = (size.dense, size.dense, size.layers_dense)
        left = (size.stored, size.nonzero, size.layers_stored)
        shares = [part / dense for part, dense in zip(left, whole, strict=True)]
        for name, share in zip(self._sizes, shares, strict=False):
            self._sizes[name].set_width(share)
        return self.figure

    def prepare(self) -> None:
        """Draw every domain's ticks, labels and distributions now; `draw` must follow."""
        for domain in self.magnitudes:
            with mpl.rc_context(_LOOK):
                self._show_domain(domain)
            self._keep_background()

    def png(self) -> bytes:
        """The picture as PNG; ticks, labels and distributions are drawn once for each domain."""
        if self._domain not in self._backgrounds:
            self._keep_background()
        self._canvas.restore_region(self._backgrounds[self._domain])
        for artist in self._moving:
            artist.axes.draw_artist(artist)
        buffer = io.BytesIO()
        Image.fromarray(np.asarray(self._canvas.buffer_rgba())).convert("RGB").save(
            buffer, format="png", compress_level=1
        )
        return buffer.getvalue()

    def _keep_background(self) -> None:
        for artist in self._moving:
            artist.set_animated(True)
        with mpl.rc_context(_LOOK):
            self._canvas.draw()
        self._backgrounds[self._domain] = self._canvas.copy_from_bbox(self.figure.bbox)
        for artist in self._moving:
            artist.set_animated(False)

    def _place(self, component: str, epsilon: float) -> float:
        """Where ε stands on the axis of a histogram; zero, over the bar of zeros."""
        edges = self._edges[component]
        return np.log10(epsilon) if epsilon > 0 else edges[0] - 0.02 * np.ptp(edges)

    def _show_domain(self, domain: str) -> None:
        self._domain, found = domain, self.magnitudes[domain]
        tint = colour(domain, list(self.magnitudes))
        for name, parts in self._histograms.items():
            values, edges = found.pooled[name], self._edges[name]
            live = values[np.searchsorted(values, 0, side="right") :]
            shares = np.histogram(np.log10(live), edges)[0] / max(len(values), 1)
            zero = 1 - len(live) / max(len(values), 1)
            parts["steps"].set(data=shares, color=tint)
            parts["never"].set(height=zero, color=tint)
            # a bar of zeros may be ten times as high as all the rest: its number stands beside it
            parts["axis"].set_ylim(0, 1.25 * max(shares.max(), 1e-9))
            parts["note"].set_text(f"exactly 0: {zero:.1%}" if zero else "")
            what = "tokens" if name == "embedding" else "neurons"
            parts["axis"].set_title(f"{name}: {len(values):,} {what}", fontsize=8.5)
        edges = self._edges["activation"]
        with np.errstate(divide="ignore"):
            density = np.stack([np.histogram(np.log10(v), edges)[0] / len(v) for v in found.layers])
        self._image.set_data(density)
        self._image.set_clim(0, np.quantile(density, 0.995) or 1)
        measured = found.statistics
        self._caption.set_text(
            f"{measured.model_name}; {domain}: {measured.n_tokens:,} calibration tokens; one scale "
            "for all domains"
        )
        self._third.clear()
        self._marks, self._sizes = {}, {}
        if domain in self.sweeps:
            self._losses(self._third, self.sweeps[domain])
        else:
            self._sizing(self._third)


def _log_axis(axis: Axes, edges: np.ndarray, zero_at: float | None = None) -> None:
    """Whole powers of ten on an axis of logarithms, and a place for zero beside them."""
    powers = np.arange(np.ceil(edges[0] + 0.05 * np.ptp(edges)), np.floor(edges[-1]) + 1)
    words = [f"{10.0**power:g}" if -3 <= power <= 3 else f"1e{power:.0f}" for power in powers]
    zero = [] if zero_at is None else [zero_at]
    axis.set_xticks([*zero, *powers], ["0"] * len(zero) + words)
