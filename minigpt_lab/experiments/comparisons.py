"""Runs beside each other, from their records alone: sizes, perplexities, the Pareto front."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from ..checks import (
    Flag,
    Frame,
    ListOf,
    Location,
    Number,
    OneOf,
    Text,
    checked,
    first_line,
    suggest,
)
from .records import read_records

#: Columns that perplexities have in common if they can be compared: one model, and the same
#: windows of the same text.
COMPARABLE = ("model", "protocol", "text")
SIZES = ("stored", "nonzero")
_NUMBERS = {*SIZES, "perplexity", "low", "high"}
_COLUMNS = ["run", "notebook", *COMPARABLE, "domain", "method", "inside", *SIZES, "perplexity"]
_COLUMNS += ["low", "high", "stored_ratio", "nonzero_ratio", "perplexity_ratio"]


@checked(root=Location(), smoke=Flag())
def measurements(root: str | os.PathLike = "runs", *, smoke: bool = False) -> pd.DataFrame:
    r"""Every model that the runs under a folder measured: its size and its perplexity on a text.

    They come from the ``summary`` tables of notebooks that record both (00, 03, 04, 05). The
    masked and the reloaded copy of a model are left out: they are the shrunk model again. The
    dense model appears once for every text and protocol. Where models or texts of one label have
    different hashes, the beginning of the hash is added to the label.

    Parameters
    ----------
    root : str or path
        A run folder, or any folder above some.
    smoke : bool
        Smoke runs too.

    Returns
    -------
    pandas.DataFrame
        Columns ``run, notebook, model, protocol`` (test tokens, window and precision), ``text,
        domain`` (of the text), ``method`` (``"dense"``, ``"pruned"``, ``"recovered, full"``,
        ``"random"``, …), ``inside`` (the model was pruned for this domain), ``stored, nonzero``
        (parameters; the second is NaN where a notebook does not say), ``perplexity`` on the scale
        of the dense model's tokens: :math:`P_\text{dense}^{b/b_\text{dense}}` with bits per
        character :math:`b` where the vocabulary was pruned, its 95 % interval ``low, high``
        (likewise; NaN where a notebook gives none), and ``stored_ratio, nonzero_ratio,
        perplexity_ratio`` to dense.

    Raises
    ------
    ValueError
        If there is no such folder.
    """
    parts = []
    for folder, content in read_records(root, smoke=smoke):
        path = folder / "summary.csv"
        try:
            table = pd.read_csv(path) if path.is_file() else pd.DataFrame()
            if {"variant", "stored", "perplexity"} <= {*table.columns}:
                run = {"run": folder.relative_to(root).as_posix(), "notebook": content["notebook"]}
                parts.append(_measured(table, content).assign(**run))
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            warnings.warn(f"left out: the summary of {folder}: {first_line(error)}", stacklevel=2)
    if not parts:
        return pd.DataFrame(columns=_COLUMNS)
    frame = pd.concat(parts, ignore_index=True)
    frame["model"] += _hash_marks(frame["model"], frame["weights"])
    frame["domain"] += _hash_marks(frame["text"], frame["content"])
    frame["text"] = frame["domain"] + "/" + frame["text"].str.rsplit("/", n=1).str[-1]
    frame = frame[_COLUMNS]
    repeated = frame["method"].eq("dense") & frame.duplicated([*COMPARABLE, "method"])
    return frame[~repeated].reset_index(drop=True)


def _hash_marks(labels: pd.Series, hashes: pd.Series) -> pd.Series:
    """The beginning of each hash where its label has several, else an empty string."""
    several = hashes.groupby(labels).transform("nunique") > 1
    return (" (" + hashes.str[:6] + ")").where(several, "")


def _measured(table: pd.DataFrame, content: dict) -> pd.DataFrame:
    """A summary table with the columns of `measurements`, and the hashes of model and texts."""
    parameters, model = content["parameters"], content.get("model") or {}
    table = table[~table["variant"].isin(["masked", "reloaded"])]
    table = table.astype(dict.fromkeys(_NUMBERS & {*table.columns}, float))
    table["text"] = table["text"] if "text" in table else table["domain"] + "/test"
    table["domain"] = table["text"].str.rsplit("/", n=1).str[0]
    regimes = parameters.get("stored_ratios") or {}
    table["method"] = [_method(variant, regimes) for variant in table["variant"]]
    table["inside"] = _is_inside(table["domain"], parameters) | (table["method"] == "dense")
    dense = table[table["method"] == "dense"].drop_duplicates("text").set_index("text")
    dense_perplexity = table["text"].map(dense["perplexity"])
    if "bits_per_character" in table:
        bits_ratio = table["bits_per_character"] / table["text"].map(dense["bits_per_character"])
        rescaled = dense_perplexity**bits_ratio  # as if the vocabulary had not been pruned
        for bound in {"low", "high"} & set(table.columns):
            # an interval of bits is the interval of the log-perplexity, in other units
            table[bound] = rescaled ** (np.log(table[bound]) / np.log(table["perplexity"]))
        table["perplexity"] = rescaled
    if "accuracy" in table:
        table = table.drop(columns=["low", "high"])  # they are the interval of the accuracy
    table = table.reindex(columns=_COLUMNS)
    for size in SIZES:
        table[f"{size}_ratio"] = table[size] / table["text"].map(dense.get(size, {}))
    tokens, window = parameters.get("test_tokens", 0), parameters.get("seq_len")
    read_in = f", in {model['read_in']}" if "read_in" in model else ""
    hashes = {
        f"{domain}/{part}": digest
        for domain, parts in (content.get("data") or {}).items()
        for part, digest in parts.items()
    }
    return table.assign(
        model=model.get("label", ""),
        protocol=f"at most {tokens:,} test tokens, windows of {window}" + read_in,
        perplexity_ratio=table["perplexity"] / dense_perplexity,
        weights=model.get("sha256", "?"),
        content=[hashes.get(text, "?") for text in table["text"]],
    )


def _is_inside(domains: pd.Series, parameters: dict) -> pd.Series:
    """Whether a model was pruned for each of some domains: the run's one, or all of its many."""
    name = parameters.get("domain_name")
    if name is None:
        return pd.Series(True, index=domains.index)
    return domains.isin([name, Path(name).stem, name.replace("/", "-")])  # a path, a hub id


def _method(variant: str, regimes: dict) -> str:
    """The method behind a variant of any size; `regimes` are the sizes of notebook 04."""
    regime, *how = variant.split(", ")
    if regime in regimes:  # how it was pruned, and the loss it was trained with
        return ", ".join(["recovered" if len(how) > 1 else "pruned", *how])
    return {"shrunk": "pruned"}.get(variant, variant)


@checked(
    frame=Frame(),
    domains=ListOf(Text()) | None,
    methods=ListOf(Text()) | None,
    size=OneOf(SIZES),
    outside=Flag(),
)
def select(
    frame: pd.DataFrame,
    *,
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
        Models on texts of domains that they were not pruned for, too.

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
    # a dense model with nothing to compare it with goes
    others = kept.loc[kept["method"] != "dense", list(COMPARABLE)].drop_duplicates()
    return kept.merge(others, on=list(COMPARABLE)).reset_index(drop=True)


@checked(frame=Frame(), size=OneOf(SIZES))
def pareto(frame: pd.DataFrame, *, size: str = "stored") -> pd.Series:
    """Membership of the Pareto front of size and perplexity, per model, protocol and text.

    A row is on the front if no other of its group is at least as good in both and better in one.

    Parameters
    ----------
    frame : pandas.DataFrame
        From `measurements`.
    size : {"stored", "nonzero"}
        Models of which this size is not known are never on the front.

    Returns
    -------
    pandas.Series
        True or False for every row.
    """
    front = pd.Series(False, index=frame.index)
    for _, group in frame.dropna(subset=[size, "perplexity"]).groupby(
        list(COMPARABLE), dropna=False
    ):
        points = group[[size, "perplexity"]].to_numpy()
        no_worse = (points[:, None] <= points).all(axis=-1)  # [row, column]: row than column
        dominates = no_worse & (points[:, None] < points).any(axis=-1)
        front[group.index] = ~dominates.any(axis=0)
    return front


@checked(frame=Frame(), tolerance=Number(above=0), size=OneOf(SIZES))
def smallest(frame: pd.DataFrame, tolerance: float, *, size: str = "stored") -> pd.DataFrame:
    """The smallest model of every text whose perplexity is still good enough.

    Parameters
    ----------
    frame : pandas.DataFrame
        From `measurements`.
    tolerance : float
        Highest perplexity, as a multiple of the dense model's.
    size : {"stored", "nonzero"}
        The size that is minimised.

    Returns
    -------
    pandas.DataFrame
        One row of `frame` per model, protocol and text; of the dense model where nothing else
        will do.
    """
    good = frame[frame["perplexity_ratio"] <= tolerance].dropna(subset=[size])
    chosen = good.sort_values([size, "perplexity"]).groupby(list(COMPARABLE), sort=False).head(1)
    return chosen.sort_values(list(COMPARABLE), ignore_index=True)
