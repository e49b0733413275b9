"""One look for every picture: palette, fonts, captions, and how a figure is written to disk.

One colour per domain and per method everywhere (Okabe–Ito, safe for colour-blind readers).
"""

from __future__ import annotations

import functools
import io
import os
import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

_CYCLE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DOMAIN_COLOURS = dict(
    zip(("law", "medical", "economics", "games", "translation", "general"), _CYCLE, strict=True)
)
METHOD_STYLE = {  # colour, marker: readable in grey by the marker; drawn in this order
    "contextual": ("#0072B2", "o"),
    "magnitude": ("#E69F00", "s"),
    "random": ("#7F7F7F", "x"),
    "full": ("#0072B2", "o"),
    "lora": ("#D55E00", "s"),
}
VARIANT_STYLE = {
    "dense": ("#000000", "o"),
    "random": ("#7F7F7F", "x"),
    "pruned": ("#D55E00", "s"),
    "recovered": ("#0072B2", "D"),
}
COMPONENT_STYLE = {  # colour, marker, line
    "linear": ("#E69F00", "s", "--"),
    "activation": ("#0072B2", "o", "-"),
    "embedding": ("#009E73", "^", ":"),
    "all": ("#000000", "D", "-."),
}
PART_COLOURS = {
    "embeddings": "#56B4E9",
    "attention": "#E69F00",
    "ffn": "#0072B2",
    "other": "#999999",
}
STYLE = {
    "figure.dpi": 100, "savefig.dpi": 150, "font.size": 9, "axes.titlesize": 11,
    "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.spines.top": False,
    "axes.spines.right": False, "axes.axisbelow": True, "axes.grid": True, "grid.alpha": 0.25,
    "legend.frameon": False,
}  # fmt: skip


def colour(domain: str, known: Sequence[str] = ()) -> str:
    """The colour of a domain; a user's own takes the next that none of those `known` has."""
    fixed = {name: DOMAIN_COLOURS.get(name.removeprefix("tiny-")) for name in (domain, *known)}
    if fixed[domain] or domain not in known:
        return fixed[domain] or "#000000"
    free = [tint for tint in _CYCLE if tint not in fixed.values()] or _CYCLE
    own = [name for name in known if not fixed[name]]
    return free[own.index(domain) % len(free)]


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


def log_ticks(low: float, high: float) -> tuple[list[float], list[str]]:
    """Round numbers from `low` to `high`, few enough to be read, and their labels."""
    powers = np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 1)
    steps = (1,) if len(powers) > 5 else (1, 3) if high / low > 30 else (1, 2, 5)
    every = -(-len(powers) // 6)
    marks = [step * 10.0**power for power in powers[::-every] for step in steps]
    marks = [mark for mark in marks if low <= mark <= high]
    words = [f"$10^{{{np.log10(mark):.0f}}}$" if len(powers) > 5 else f"{mark:g}" for mark in marks]
    return marks, words


def styled(function):
    """Draw under the kit's style, whatever the reader's matplotlib settings are."""

    @functools.wraps(function)
    def draw(*args, **kwargs) -> Figure:
        with mpl.rc_context(STYLE):
            return function(*args, **kwargs)

    return draw


def png_bytes(figure: Figure) -> bytes:
    """The figure as PNG bytes; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def save_figure(
    figure: Figure, path: str | os.PathLike, data: pd.DataFrame | None = None
) -> Figure:
    """Write a figure as PNG and SVG, and the data behind it as CSV, under one stem.

    Returns
    -------
    matplotlib.figure.Figure
        The figure, so that a notebook cell shows it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context({**STYLE, "svg.hashsalt": "minigpt_lab"}):
        figure.savefig(path.with_suffix(".png"), metadata={"Software": None})
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
    if data is not None:
        data.to_csv(path.with_suffix(".csv"), index=False)
    return figure
