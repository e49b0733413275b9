"""The style of every picture: palette, fonts, captions; figures as bytes and as files.

One colour per domain and per method everywhere (Okabe–Ito, safe for colour-blind readers, then
darker ones), and a marker or hatch that says the same in grey.
"""

from __future__ import annotations

import io
import os
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from functools import partial

import matplotlib as mpl
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import get_font_names
from transformers import PreTrainedModel

from ..checks import Instance, ListOf, Location, Text, checked, to_path, writable_file
from ..models import label
from ..store import atomic_write

# 11 and 13: as no number divides both, their pairs come again only after all 143
_COLOURS = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"),
    *("#332288", "#882255", "#8A8A00", "#7A4A1E", "#AA4499"),
)
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "h", "p", "d", "8")
_DOMAINS = ("law", "medical", "economics", "games", "translation", "general")
_METHODS = (
    *("contextual", "fluctuation", "sensitivity", "sparsegpt", "magnitude", "taylor"),
    *("wanda", "slimgpt", "fluctuation + bias", "slimgpt log-increase"),
)
Style = tuple[str, str]


def _numbered(names: Sequence[str]) -> dict[str, Style]:
    return dict(zip(names, zip(_COLOURS, _MARKERS, strict=False), strict=False))


# colour and marker
DOMAIN_STYLE: dict[str, Style] = _numbered(_DOMAINS)
METHOD_STYLE: dict[str, Style] = _numbered(_METHODS) | {
    "random": ("#7F7F7F", "x"),
    "dense": ("#000000", "*"),
}
VARIANT_STYLE: dict[str, Style] = {
    "dense": ("#000000", "o"),
    "random": ("#7F7F7F", "x"),
    "pruned": ("#D55E00", "s"),
    "recovered, label": ("#0072B2", "D"),
    "recovered, kl": ("#56B4E9", "P"),
    "recovered, mix": ("#CC79A7", "v"),
    "dense, fine-tuned": ("#009E73", "^"),
    "mini": ("#332288", "p"),
}
PART_STYLE: dict[str, Style] = {  # colour, hatch
    "embeddings": ("#56B4E9", "///"),
    "attention": ("#E69F00", "..."),
    "ffn": ("#0072B2", ""),
    "other": ("#999999", "xxx"),
}
# letters that the first font lacks come from the next that has them
_FONTS = (
    *("DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC"),
    *("WenQuanYi Micro Hei", "PingFang SC", "Hiragino Sans", "Microsoft YaHei"),
    *("Arial Unicode MS", "Noto Sans Devanagari", "Noto Sans Thai"),
)
STYLE = {
    "figure.dpi": 100,
    "savefig.dpi": 150,
    "font.size": 9,
    "font.family": [name for name in _FONTS if name in get_font_names()],
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "legend.fontsize": 8,
}


@checked(name=Text(), known=ListOf(Text()))
def style_for(
    name: str, known: Sequence[str] = (), table: Mapping[str, Style] = DOMAIN_STYLE
) -> Style:
    """Colour and marker of a domain or, from another table, of a method or variant.

    Parameters
    ----------
    name : str
        ``tiny-law`` and ``law/test`` look like ``law``.
    known : sequence of str
        All that the figure shows. One that is not in the table takes the next colour and marker
        that none of the others has; once all are taken they come again, in other pairs.
    table : mapping
        `DOMAIN_STYLE`, `METHOD_STYLE` or `VARIANT_STYLE`.
    """
    styles = {
        each: table.get(each.removeprefix("tiny-").rsplit("/", 1)[0]) for each in (name, *known)
    }
    if styles[name] or name not in known:
        return styles[name] or ("#000000", "o")
    place = [each for each in known if not styles[each]].index(name)
    taken = {part for style in styles.values() if style for part in style}
    colours, markers = (
        [part for part in parts if part not in taken] or parts for parts in (_COLOURS, _MARKERS)
    )
    return colours[place % len(colours)], markers[place % len(markers)]


def looks(names: Iterable[str], table: Mapping[str, Style] = DOMAIN_STYLE) -> dict[str, dict]:
    """Name to its colour and marker, as `Axes.plot` takes them."""
    known = list(dict.fromkeys(names))
    styles = {name: style_for(name, known, table) for name in known}
    return {name: {"color": tint, "marker": marker} for name, (tint, marker) in styles.items()}


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


def new_figure(width: float, height: float, caption: str = "", title: str = "") -> Figure:
    """An empty figure of a size in inches, with its title and caption wrapped to its width."""
    head = textwrap.wrap(title, int(width * 10))  # characters of this size that fit
    foot = [part for line in caption.splitlines() for part in textwrap.wrap(line, int(width * 17))]
    more = 0.19 * max(len(head) - 1, 0) + 0.12 * max(len(foot) - 2, 0)  # the drawing keeps its room
    figure = Figure(figsize=(width, height + more), layout="constrained")
    if head:
        figure.suptitle("\n".join(head), x=0.01, ha="left", fontsize=11, fontweight="bold")
    if foot:
        figure.supxlabel("\n".join(foot), fontsize=7.5, color="#555555", x=0.01, ha="left")
    return figure


def with_note(caption: str, note: str) -> str:
    """The caption with a note of the figure's own on the next line."""
    return f"{caption}\n{note}" if caption else note


def png_bytes(figure: Figure) -> bytes:
    """The figure as PNG bytes; the same figure gives the same bytes."""
    Instance(Figure)("figure", figure)
    buffer = io.BytesIO()
    # draws once, for a slider; savefig would draw twice
    FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()


def save_figure(figure: Figure, path: str | os.PathLike, data: pd.DataFrame) -> Figure:
    """Write a figure as PNG and SVG, and the data behind it as CSV, under one stem.

    Parameters
    ----------
    figure : matplotlib.figure.Figure
        Drawn by a function of this package.
    path : str or path
        Folder and stem.
    data : pandas.DataFrame
        The frame it was drawn from: a picture without its numbers cannot be checked.

    Returns
    -------
    matplotlib.figure.Figure
        The figure, so that a notebook cell shows it.
    """
    figure = Instance(Figure)("figure", figure)
    data = Instance(pd.DataFrame)("data", data)
    path = to_path(Location()("path", path))
    stem = path.name.removesuffix(".png").removesuffix(".svg").removesuffix(".csv")
    write = {
        "png": partial(figure.savefig, metadata={"Software": None}),
        "svg": partial(figure.savefig, metadata={"Date": None}),
        "csv": partial(data.to_csv, index=False),
    }
    paths = [writable_file(path.with_name(f"{stem}.{kind}")) for kind in write]
    with mpl.rc_context({**STYLE, "svg.hashsalt": "minigpt_lab"}):
        for target, write_file in zip(paths, write.values(), strict=True):
            with atomic_write(target) as staging:
                write_file(staging)
    return figure
