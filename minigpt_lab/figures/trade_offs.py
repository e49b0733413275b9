"""What is paid for what: size for loss, a format for bytes, general text for the domain."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from .axes import key, log_labels, panel_row, percent, side_legend
from .frames import draws_frame
from .style import looks, new_figure, with_note

_KINDS = {"F16": ("#000000", "o"), "Q8_0": ("#0072B2", "s"), "Q4_0": ("#D55E00", "^")}


@draws_frame(names="text model kind", numbers="bytes bits_per_character")
def format_curves(table: pd.DataFrame, *, caption: str = "") -> Figure:
    """Bytes on disk against bits per character: a line per format, a point per size of the model.

    Where the line of fewer bits is lower, rounding costs less than pruning. The model ``dense`` is
    a star of its own, as it was not trained.

    Parameters
    ----------
    table : pandas.DataFrame
        Columns ``text, model, kind, bytes, bits_per_character`` of `studies.format_losses`.
    caption : str
        Model, text, protocol.
    """
    caption = with_note(caption, "a line: one format; a point: one size of the model")
    shape, ask = (4.2, 4.0), "Prune or quantise?"
    figure, panels = panel_row(table, "text", caption, ask, size=shape, sharex=True)
    styles = looks(table["kind"], _KINDS)
    for axis, _, rows in panels:
        rows = rows.assign(dense=rows["model"] == "dense").sort_values("bytes")
        for (kind, dense), points in rows.groupby(["kind", "dense"]):
            look = styles[kind] | ({"marker": "*", "ms": 11, "ls": ""} if dense else {"lw": 1.4})
            axis.plot(points["bytes"] / 1e6, points["bits_per_character"], **look)
        axis.set(xscale="log", yscale="log", xlabel="file in MB")
        log_labels(axis.xaxis, rows["bytes"] / 1e6, n=5)
        log_labels(axis.yaxis, rows["bits_per_character"])
    figure.axes[0].set_ylabel("bits per character (lower is better)")
    keys = [key(name, **look) for name, look in styles.items()]
    star = [key("dense, not trained", color="gray", marker="*")] * ("dense" in {*table["model"]})
    side_legend(figure, *keys, *star)
    return figure


@draws_frame(names="text", numbers="ratio generality perplexity")
def generality_front(
    table: pd.DataFrame, *, domain: str, other: str, chosen: float | None = None, caption: str = ""
) -> Figure:
    """Perplexity on both texts against the share of general text, and against each other.

    Parameters
    ----------
    table : pandas.DataFrame
        From `minigpt_lab.studies.generality_curve`: columns ``text, ratio, generality,
        perplexity``; the dense model has no ratio.
    domain, other : str
        The domain's text and the general one.
    chosen : float, optional
        Share μ that is marked in both panels.
    caption : str
        Model, calibration, protocol.
    """
    question = "What does a share of general text buy, and what does it cost?"
    figure = new_figure(10.8, 4.2, caption, question)
    left, right = figure.subplots(1, 2)
    dense = table[table["ratio"].isna()].groupby("text")["perplexity"].first()
    pruned = table.dropna(subset=["ratio"])
    names = {ratio: f"{ratio:.0%} removed" for ratio in sorted(pruned["ratio"].unique())}
    styles = looks([*names.values()])
    lines = {str(domain): "-", str(other): "--"}
    for ratio, name in names.items():
        own = pruned[pruned["ratio"] == ratio].sort_values("generality")
        places = own.pivot(index="generality", columns="text", values="perplexity")
        for text, line in lines.items():
            left.plot(places[text], **{**styles[name], "ls": line, "ms": 4})
        right.plot(places[str(domain)], places[str(other)], **{**styles[name], "ms": 5})
        for share, point in places.iterrows():
            place = (point[str(domain)], point[str(other)])
            right.annotate(f"{share:g}", place, (3, 3), textcoords="offset points", fontsize=7)
    for text, line in lines.items():
        left.axhline(dense[text], color="black", lw=0.8, ls=line, zorder=0)
    right.plot(dense[str(domain)], dense[str(other)], "*", color="black", ms=12)
    if chosen is not None:
        left.axvline(chosen, color="black", lw=1, ls=":")
        marked = pruned[pruned["generality"] == chosen]
        marked = marked.pivot(index="ratio", columns="text", values="perplexity")
        around = {"ls": "", "marker": "o", "ms": 13, "mfc": "none", "mec": "black"}
        right.plot(marked[str(domain)], marked[str(other)], **around)
    left.set(xlabel="share μ of general text", ylabel="test perplexity", yscale="log")
    log_labels(left.yaxis, [*pruned["perplexity"], *dense])
    right.set(xscale="log", yscale="log", xlabel=f"perplexity on {domain}")
    right.set_ylabel(f"perplexity on {other}")
    for axis, text in ((right.xaxis, domain), (right.yaxis, other)):
        own = pruned.loc[pruned["text"] == str(text), "perplexity"]
        log_labels(axis, [*own, dense[str(text)]])
    keys = [key(name, **{**look, "ls": "-"}) for name, look in styles.items()]
    keys += [key(text, color="gray", ls=line, marker="") for text, line in lines.items()]
    side_legend(figure, *keys, key("dense", color="black", marker="*"))
    return figure


@draws_frame(names="text way", numbers="stored increase limit within")
def limit_curves(curves: pd.DataFrame, *, caption: str = "") -> Figure:
    """Loss of every size that was tried, beside the limits; the smallest one within is filled.

    Parameters
    ----------
    curves : pandas.DataFrame
        From `minigpt_lab.studies.smallest_within`, a row per size, way and text: columns ``text,
        way, stored, increase, limit, within``; `within` says whether it keeps the limits of all
        texts.
    caption : str
        Model, calibration, protocol.
    """
    title = "How small within the limits?"
    figure, panels = panel_row(curves, "text", caption, title, size=(4.0, 3.6), beside=1.9)
    styles = looks(curves["way"])
    for axis, _, part in panels:
        for way, look in styles.items():
            own = part[part["way"] == way].sort_values("stored")
            axis.plot(own["stored"] / 1e6, own["increase"], mfc="white", ms=6, lw=1.2, **look)
            best = own[own["within"].astype(bool)].head(1)
            axis.plot(best["stored"] / 1e6, best["increase"], ms=8, **look)
        limit = part["limit"].iloc[0]
        axis.axhline(limit, color="black", lw=1, ls=":")
        # the limit is seen, and a size far beyond it does not flatten the rest
        axis.set_ylim(top=1.05 * max(limit, min(part["increase"].max(), 4 * limit)))
        axis.set(xlabel="stored parameters, millions", ylabel="perplexity above dense")
        axis.yaxis.set_major_formatter(percent)
    keys = [key(way, **look) for way, look in styles.items()]
    side_legend(figure, *keys, key("limit", color="black", ls=":", marker=""))
    return figure
