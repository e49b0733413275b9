"""Runs beside each other, from their records alone: sizes, perplexities, the Pareto front."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from ..checks import (
    Flag,
    Instance,
    ListOf,
    Location,
    Number,
    OneOf,
    Text,
    checked,
    first_line,
    suggest,
)
from ..store import read_text
from .records import read_records

#: What one perplexity can be compared with: same model, same windows of the same text. The labels
#: of `measurements` differ where the content does.
COMPARABLE = ("model", "protocol", "text")
SIZES = ("stored", "nonzero")
_COLUMNS = (
    "run", "notebook", "model", "protocol", "text", "domain", "method", "inside", "stored",
    "nonzero", "perplexity", "low", "high", "stored_ratio", "nonzero_ratio", "perplexity_ratio",
)  # fmt: skip


@checked(root=Location(), everything=Flag())
def measurements(root: str | os.PathLike = "runs", everything: bool = False) -> pd.DataFrame:
    r"""Every model that the runs under a folder measured: its size and its perplexity on a text.

    They come from the ``summary`` tables of notebooks that record both (00, 03, 04, 05). The mask
    and the reloaded copy of a model are left out: they are the shrunk model again. The dense model
    stands once for every text and protocol. Where models or texts of one label have different
    hashes in their records, each label gets the beginning of its hash: they are not the same.

    Parameters
    ----------
    root : str or path
        A run folder, or any folder above some.
    everything : bool
        Smoke runs too.

    Returns
    -------
    pandas.DataFrame
        Columns ``run, notebook, model, protocol`` (test tokens and window), ``text, domain`` (of
        the text), ``method`` (``"dense"``, ``"pruned"``, ``"recovered, full"``, ``"random"``, …),
        ``inside`` (the model was cut for this domain), ``stored, nonzero`` (parameters; the second
        is NaN where a notebook does not say), ``perplexity`` on the scale of the dense model's
        tokens: :math:`P_\text{dense}^{b/b_\text{dense}}` with bits per character :math:`b`
        where the vocabulary was cut, its 95 % interval ``low, high`` (likewise; NaN where a
        notebook gives none), and ``stored_ratio, nonzero_ratio, perplexity_ratio`` to dense.

    Raises
    ------
    ValueError
        If there is no such folder.
    """
    parts = []
    for folder, content in read_records(root, everything):
        if content["status"] != "completed":
            continue
        facts = {"run": folder.relative_to(root).as_posix(), "notebook": content["notebook"]}
        try:
            table = _summary(folder / "summary.csv")
            if table is not None:
                parts.append(_measured(table, content).assign(**facts))
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            warnings.warn(f"left out: the summary of {folder}: {first_line(error)}", stacklevel=2)
    if not parts:
        return pd.DataFrame(columns=list(_COLUMNS))
    frame = pd.concat(parts, ignore_index=True)
    frame["model"] += _marks(frame["model"], frame["weights"])
    mark = _marks(frame["text"], frame["content"])
    rest = [text[len(own) :] for own, text in zip(frame["domain"], frame["text"], strict=True)]
    frame["domain"] += mark
    frame["text"] = frame["domain"] + rest
    frame = frame[list(_COLUMNS)]
    again = frame["method"].eq("dense") & frame.duplicated([*COMPARABLE, "method"])
    return frame[~again].reset_index(drop=True)


def _summary(path: Path) -> pd.DataFrame | None:
    """A run's table of sizes and perplexities, if it has one."""
    try:
        table = pd.read_csv(io.StringIO(read_text(path)))
    except FileNotFoundError:
        return None
    if not {"variant", "stored", "perplexity"} <= set(table.columns):
        return None
    numbers = ["stored", "perplexity", *({"nonzero", "low", "high"} & {*table.columns})]
    return table.assign(**{name: table[name].astype(float) for name in numbers})


def _marks(labels: pd.Series, hashes: pd.Series) -> pd.Series:
    """What tells labels apart that stand for different content, nothing where one does not."""
    several = hashes.groupby(labels).transform("nunique") > 1
    return (" (" + hashes.str[:6] + ")").where(several, "")


def _measured(table: pd.DataFrame, content: dict) -> pd.DataFrame:
    parameters, model = content["parameters"], content.get("model") or {}
    hashes = {
        f"{domain}/{part}": digest
        for domain, parts in (content.get("data") or {}).items()
        for part, digest in parts.items()
    }
    table = table[~table["variant"].isin(["masked", "reloaded"])].copy()
    table["text"] = table["text"] if "text" in table else table["domain"] + "/test"
    table["domain"] = table["text"].str.rsplit("/", n=1).str[0]
    regimes = parameters.get("stored_ratios") or {}
    table["method"] = [_method(variant, regimes) for variant in table["variant"]]
    own = parameters.get("domain")  # a name, a path or a hub id; none if each is its own
    names = table["domain"] if own is None else [own, Path(own).stem, own.replace("/", "-")]
    table["inside"] = table["domain"].isin(names) | (table["method"] == "dense")
    table["model"] = model.get("label", "")
    tokens, window = parameters.get("test_tokens", 0), parameters.get("seq_len")
    table["protocol"] = f"at most {tokens:,} test tokens, windows of {window}"
    dense = table[table["method"] == "dense"].drop_duplicates("text").set_index("text")
    level = table["text"].map(dense["perplexity"])
    if "bits_per_character" in table:
        power = table["bits_per_character"] / table["text"].map(dense["bits_per_character"])
        same = level**power  # as if the vocabulary had not been cut
        for bound in {"low", "high"} & set(table.columns):
            # an interval of bits is the interval of log-perplexity, in other units
            table[bound] = same ** (np.log(table[bound]) / np.log(table["perplexity"]))
        table["perplexity"] = same
    if "accuracy" in table:
        table = table.drop(columns=["low", "high"])  # they are its interval
    table = table.reindex(columns=list(_COLUMNS))
    for kind in ("stored", "nonzero"):
        table[f"{kind}_ratio"] = table[kind] / table["text"].map(dense.get(kind, {}))
    return table.assign(
        perplexity_ratio=table["perplexity"] / level,
        weights=model.get("sha256", "?"),
        content=table["text"].map(hashes).fillna("?"),
    )


def _method(variant: str, regimes: dict) -> str:
    """What was done to a model, whatever size it was cut to."""
    regime, _, trained = variant.partition(", ")
    if regime in regimes:
        return f"recovered, {trained}" if trained else "pruned"
    return {"shrunk": "pruned"}.get(variant, variant)


@checked(
    frame=Instance(pd.DataFrame), domains=ListOf(Text()) | None, methods=ListOf(Text()) | None,
    size=OneOf(SIZES), outside=Flag(),
)  # fmt: skip
def select(
    frame: pd.DataFrame,
    domains: Sequence[str] | None = None,
    methods: Sequence[str] | None = None,
    size: str = "stored",
    outside: bool = False,
) -> pd.DataFrame:
    """Some of the measured models, with the dense ones of the same texts.

    Parameters
    ----------
    frame : pandas.DataFrame
        From `measurements`.
    domains, methods : sequence of str, optional
        Only these; by default all.
    size : {"stored", "nonzero"}
        Only models of which this size is known.
    outside : bool
        Models on texts of domains that they were not cut for, too.

    Raises
    ------
    ValueError
        If there are runs, but none measured one of the domains or methods, or there is no such
        size.
    """
    kept = frame[frame[size].notna() & (frame["inside"].astype(bool) | outside)]
    for column, wanted in (("domain", domains), ("method", methods)):
        known = list(dict.fromkeys(kept[column]))
        for name in wanted or ():
            if known and name not in known:
                raise ValueError(f"no run has the {column} {name!r}; {suggest(name, known)}")
        dense = (column == "method") & kept["method"].eq("dense")
        kept = kept[kept[column].isin(known if wanted is None else wanted) | dense]
    cut = kept.loc[kept["method"] != "dense", list(COMPARABLE)]  # a dense model alone says nothing
    return kept.merge(cut.drop_duplicates(), on=list(COMPARABLE)).reset_index(drop=True)


@checked(frame=Instance(pd.DataFrame))
def pareto(frame: pd.DataFrame, size: str = "stored", loss: str = "perplexity") -> pd.Series:
    """Which rows are on the Pareto front of their model, protocol and text.

    A row is on the front if no other of its group is at least as good in both columns and better
    in one: no smaller model has so low a perplexity.

    Parameters
    ----------
    frame : pandas.DataFrame
        From `measurements`.
    size, loss : str
        Columns, lower is better; rows that lack one are never on the front.

    Returns
    -------
    pandas.Series
        True or False for every row.
    """
    front = pd.Series(False, index=frame.index)
    for _, group in frame.dropna(subset=[size, loss]).groupby(list(COMPARABLE), dropna=False):
        points = group[[size, loss]].to_numpy()
        no_worse = (points[:, None] <= points).all(axis=-1)  # row than column
        beats = no_worse & (points[:, None] < points).any(axis=-1)
        front[group.index] = ~beats.any(axis=0)
    return front


@checked(frame=Instance(pd.DataFrame), tolerance=Number(above=0), size=OneOf(SIZES))
def smallest(frame: pd.DataFrame, tolerance: float, size: str = "stored") -> pd.DataFrame:
    """The smallest model of every text whose perplexity is still good enough.

    Parameters
    ----------
    frame : pandas.DataFrame
        From `measurements`.
    tolerance : float
        Highest perplexity, as a multiple of the dense model's.
    size : {"stored", "nonzero"}
        Which size is meant.

    Returns
    -------
    pandas.DataFrame
        One row of `frame` per model, protocol and text; of the dense model where nothing else
        will do.
    """
    good = frame[frame["perplexity_ratio"] <= tolerance].dropna(subset=[size])
    chosen = good.sort_values([size, "perplexity"]).groupby(list(COMPARABLE), sort=False).head(1)
    return chosen.sort_values(list(COMPARABLE), ignore_index=True)
