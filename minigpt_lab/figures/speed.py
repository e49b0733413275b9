"""Speed of smaller models."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

from .axes import spread
from .frames import draws_frame
from .style import VARIANT_STYLE, new_figure, style_for, with_note

_LINE = "in proportion to the size"


@draws_frame(
    names="variant kind device",
    numbers="stored tokens_per_second",
    maybe="low high",
    flags="batch runs",
)
def throughput(speeds: pd.DataFrame, *, caption: str = "") -> Figure:
    """Tokens per second against stored parameters, a panel for reading and one for writing.

    Parameters
    ----------
    speeds : pandas.DataFrame
        Columns ``variant, stored, kind`` (prefill, decode, …), ``tokens_per_second`` (median over
        the runs), ``low, high`` (its spread, such as the quartiles), ``batch, device, runs``. A
        variant named ``dense`` gives the line of a speed that is in proportion to the size.
    caption : str
        Model, lengths of prompt and continuation, meaning of the spread.
    """
    kinds, variants = (list(speeds[name].unique()) for name in ("kind", "variant"))
    batch, device, runs = (
        "/".join(map(str, speeds[name].unique())) for name in ("batch", "device", "runs")
    )
    note = f"batch {batch}, on {device}, n = {runs} runs each"
    title = "Does a smaller model run faster?"
    figure = new_figure(3.1 * len(kinds) + 1.6, 3.6, with_note(caption, note), title)
    axes = figure.subplots(1, len(kinds), sharex=True, squeeze=False).ravel()
    for axis, kind in zip(axes, kinds, strict=True):
        part = speeds[speeds["kind"] == kind].assign(millions=lambda rows: rows["stored"] / 1e6)
        for variant, rows in part.groupby("variant", sort=False):
            tint, marker = style_for(variant, variants, VARIANT_STYLE)
            middle = rows["tokens_per_second"]
            lengths = spread(middle, rows["low"], rows["high"])
            dot = {"fmt": marker, "color": tint, "ms": 6, "mfc": "none", "capsize": 3}
            axis.errorbar(rows["millions"], middle, yerr=lengths, label=variant, **dot)
        for _, dense in part[part["variant"] == "dense"].iterrows():
            sizes = np.linspace(part["millions"].min(), part["millions"].max())
            speed = dense["tokens_per_second"] * dense["millions"] / sizes
            axis.plot(sizes, speed, color="black", ls=":", lw=1, zorder=1, label=_LINE)
        axis.set_title(kind)
        axis.set_xlabel("stored parameters (millions)")
        axis.set_ylim(bottom=0)
        axis.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axis.locator_params(nbins=5)
    axes[0].set_ylabel("tokens per second (median and spread)")
    handles, labels = axes[0].get_legend_handles_labels()
    entries = dict(zip(labels, handles, strict=True))
    entries |= {_LINE: entries.pop(_LINE)} if _LINE in entries else {}  # last
    figure.legend(entries.values(), entries, loc="outside right upper")
    return figure
