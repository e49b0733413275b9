"""One look for every picture: palette, fonts, captions, and how a figure is written to disk.

One colour per domain and per method everywhere (Okabe–Ito, safe for colour-blind readers), and a
marker or hatch that says the same in grey.
"""

from __future__ import annotations

import io
import os
import textwrap
from collections.abc import Iterable, Mapping, Sequence

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import get_font_names
from matplotlib.ticker import MaxNLocator, NullFormatter
from transformers import PreTrainedModel

from ..checks import Instance, ListOf, Location, Text, checked, to_path, writable_file
from ..models import label
from ..store import atomic_write

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*", "h")  # what grey print tells apart
Look = tuple[str, str]
DOMAIN_STYLE: dict[str, Look] = {  # colour, marker
    name: (tint, marker)
    for name, tint, marker in zip(
        ("law", "medical", "economics", "games", "translation", "general"),
        _COLOURS,
        _MARKERS,
        strict=False,
    )
}
METHOD_STYLE: dict[str, Look] = {  # drawn in this order
    "contextual": ("#0072B2", "o"),
    "magnitude": ("#E69F00", "s"),
    "random": ("#7F7F7F", "x"),
    "full": ("#009E73", "^"),
    "lora": ("#CC79A7", "v"),
}
VARIANT_STYLE: dict[str, Look] = {
    "dense": ("#000000", "o"),
    "random": ("#7F7F7F", "x"),
    "pruned": ("#D55E00", "s"),
    "recovered": ("#0072B2", "D"),
}
PART_STYLE: dict[str, Look] = {  # colour, hatch
    "embeddings": ("#56B4E9", "///"),
    "attention": ("#E69F00", "..."),
    "ffn": ("#0072B2", ""),
    "other": ("#999999", "xxx"),
}
COMPONENT_STYLE = {  # colour, marker, line
    "linear": ("#E69F00", "s", "--"),
    "activation": ("#0072B2", "o", "-"),
    "embedding": ("#009E73", "^", ":"),
    "all": ("#000000", "D", "-."),
}
_FONTS = (
    "Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC", "WenQuanYi Micro Hei",
    "PingFang SC", "Hiragino Sans", "Microsoft YaHei", "Arial Unicode MS", "Noto Sans Devanagari",
    "Noto Sans Thai",
)  # fmt: skip
STYLE = {
    "figure.dpi": 100, "savefig.dpi": 150, "font.size": 9, "axes.titlesize": 11,
    "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.spines.top": False,
    "axes.spines.right": False, "axes.axisbelow": True, "axes.grid": True, "grid.alpha": 0.25,
    "legend.frameon": False,
    # letters that the first font lacks come from the next that has them
    "font.family": ["DejaVu Sans", *(name for name in _FONTS if name in get_font_names())],
}  # fmt: skip


@checked(name=Text(), known=ListOf(Text()))
def style_for(
    name: str, known: Sequence[str] = (), fixed: Mapping[str, Look] = DOMAIN_STYLE
) -> Look:
    """Colour and marker of a domain or, from another table, of a method or variant.

    Parameters
    ----------
    name : str
        ``tiny-law`` looks like ``law``.
    known : sequence of str
        All that the figure shows. One that is not in the table takes the next colour and marker
        that none of the others has; once all colours are taken they come again, with new markers.
    fixed : mapping
        The table: `DOMAIN_STYLE`, `METHOD_STYLE` or `VARIANT_STYLE`.
    """
    looks = {one: fixed.get(one.removeprefix("tiny-")) for one in (name, *known)}
    if looks[name] or name not in known:
        return looks[name] or ("#000000", "o")
    place = [one for one in known if not looks[one]].index(name)
    taken = {part for found in looks.values() if found for part in found}
    tints, markers = (
        [part for part in parts if part not in taken] or parts for parts in (_COLOURS, _MARKERS)
    )
    return tints[place % len(tints)], markers[place % len(markers)]


@checked(domain=Text(), known=ListOf(Text()))
def colour(domain: str, known: Sequence[str] = ()) -> str:
    """The colour of a domain, see `style_for`."""
    return style_for(domain, known)[0]


def caption_for(
    model: PreTrainedModel,
    *notes: str,
    domain: str = "",
    calibration_tokens: int | None = None,
    test_tokens: int | None = None,
    seq_len: int | None = None,
) -> str:
    """Caption of a figure: the model's label, calibration, notes, and the test protocol below.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        The one that was measured.
    *notes : str
        Further facts, as they are.
    domain, calibration_tokens
        Domain that the model was calibrated on (each one, if empty), and its tokens.
    test_tokens, seq_len : int, optional
        Most tokens of a test text, and the length of the windows.
    """
    windows = f"windows of {seq_len}"
    facts = [label(model)]
    if calibration_tokens is not None:
        most, whose = ("", f"of {domain}") if domain else ("at most ", "per domain")
        facts.append(f"{most}{calibration_tokens:,} calibration tokens {whose}")
    if test_tokens is not None:
        protocol = f"at most {test_tokens:,} test tokens per text, {windows}, no overlap"
        return "; ".join([*facts, *notes]) + f"\n{protocol}"
    return "; ".join([*facts, *notes] if seq_len is None else [*facts, windows, *notes])


def luminance(tint) -> float:
    """How bright a colour is, 0 (black) to 1 (white), as WCAG defines it."""
    parts = np.array(to_rgb(tint))
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return float(linear @ (0.2126, 0.7152, 0.0722))


def new_figure(
    width: float,
    height: float,
    caption: str = "",
    title: str = "",
    layout: str | None = "constrained",
) -> Figure:
    """An empty figure of a size in inches, with its title and caption wrapped to its width."""
    head = textwrap.wrap(title, int(width * 10))  # characters of this size that fit
    foot = [part for line in caption.splitlines() for part in textwrap.wrap(line, int(width * 17))]
    more = 0.19 * max(len(head) - 1, 0) + 0.12 * max(len(foot) - 2, 0)  # the drawing keeps its room
    figure = Figure(figsize=(width, height + more), layout=layout)
    if head:
        figure.suptitle("\n".join(head), x=0.01, ha="left", fontsize=11, fontweight="bold")
    if foot:
        figure.supxlabel("\n".join(foot), fontsize=7.5, color="#555555", x=0.01, ha="left")
    return figure


def log_ticks(low: float, high: float) -> tuple[list[float], list[str]]:
    """Round numbers from `low` to `high`, few enough to be read, and their labels."""
    powers = np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 1)
    steps = (1,) if len(powers) > 5 else (1, 3) if high / low > 30 else (1, 2, 5)
    every = -(-len(powers) // 6)
    marks = [step * 10.0**power for power in powers[::-every] for step in steps]
    marks = [mark for mark in marks if low <= mark <= high]
    words = [f"$10^{{{np.log10(mark):.0f}}}$" if len(powers) > 5 else f"{mark:g}" for mark in marks]
    return marks, words


def log_labels(axis: Axis, values: Iterable[float]) -> None:
    """Readable numbers on a log axis, whether `values` span a tenth of a decade or ten."""
    values = np.asarray(list(values), dtype=float)
    values = values[np.isfinite(values) & (values > 0)]
    values = values if len(values) else np.ones(1)
    low, high = values.min(), values.max()
    if high > 10 * low:
        axis.set_ticks(*log_ticks(low / 1.2, high * 1.2))
    else:
        axis.set_major_locator(MaxNLocator(6))
        axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def layer_ticks(axis: Axes, layers: int, room: int) -> None:
    """Whole layers along the horizontal axis, as many as there is `room` for."""
    step = next(step for step in (1, 2, 5, 10, 20, 50, layers) if layers <= room * step)
    axis.set_xticks(range(0, layers, step))
    axis.set_xlim(-0.6, layers - 0.4)


def heat(axis: Axes, values: pd.DataFrame, words: pd.DataFrame, fontsize: float = 8, **how) -> None:
    """A heatmap of annotated cells whose words stand out from every colour."""
    sns.heatmap(values, annot=words, fmt="", ax=axis, annot_kws={"fontsize": fontsize}, **how)
    mesh = axis.collections[0]
    mesh.update_scalarmappable()
    faces = mesh.get_facecolors()[~np.isnan(values.to_numpy(dtype=float)).ravel()]
    for text, face in zip(axis.texts, faces, strict=True):
        text.set_color("black" if luminance(face[:3]) > 0.18 else "white")
    axis.set(xlabel="", ylabel="")
    axis.grid(False)


def percent(value: float, _place: int | None = None) -> str:
    """A share in three digits at most, as tick labels want it."""
    return f"{100 * value:.3g} %".replace("-", "−")


def with_note(caption: str, note: str) -> str:
    """The caption, and what the frame says about itself below it."""
    return f"{caption}\n{note}" if caption else note


def side_legend(figure: Figure, axis: Axes, upwards: bool = False) -> None:
    """Name what is drawn on one axis, beside all of them; `upwards` begins with the last."""
    step = -1 if upwards else 1
    handles, labels = (entries[::step] for entries in axis.get_legend_handles_labels())
    figure.legend(handles, labels, loc="outside right upper", fontsize=8)


def png_bytes(figure: Figure) -> bytes:
    """The figure as PNG bytes; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    Instance(Figure)("figure", figure)
    # draws once, for a slider; savefig would draw twice
    FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()


def save_figure(figure: Figure, path: str | os.PathLike, data: pd.DataFrame) -> Figure:
    """Write a figure as PNG and SVG, and the data behind it as CSV, under one stem.

    Parameters
    ----------
    figure : matplotlib.figure.Figure
        What a function of this package drew.
    path : str or path
        Folder and stem.
    data : pandas.DataFrame
        What it was drawn from: a picture without its numbers cannot be checked.

    Returns
    -------
    matplotlib.figure.Figure
        The figure, so that a notebook cell shows it.
    """
    figure = Instance(Figure)("figure", figure)
    data = Instance(pd.DataFrame)("data", data)
    path = to_path(Location()("path", path))
    stem = path.name.removesuffix(".png").removesuffix(".svg").removesuffix(".csv")
    png, svg, csv = (
        writable_file(path.with_name(f"{stem}.{kind}")) for kind in ("png", "svg", "csv")
    )
    with mpl.rc_context({**STYLE, "svg.hashsalt": "minigpt_lab"}):
        with atomic_write(png) as staging:
            figure.savefig(staging, metadata={"Software": None})
        with atomic_write(svg) as staging:
            figure.savefig(staging, metadata={"Date": None})
    with atomic_write(csv) as staging:
        data.to_csv(staging, index=False)
    return figure
