"""Which methods of a comparison can be told apart, over calibration samples and texts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from ..checks import DictOf, Instance, ListOf, Number, OneOf, Text, checked
from ..evaluation import Perplexity, corrected, paired_differences, require_one_protocol
from .prunings import KINDS

#: What `gradient_methods` writes behind a name.
_SEED = re.compile(r" \(seed (\d+)\)$")
_LEVEL = 0.05


@checked(
    losses=ListOf(DictOf(Instance(tuple), Instance(Perplexity), 1), 1),
    sites=OneOf(KINDS),
    ratio=Number(0, below=1),
    text=Text() | ListOf(Text(), 1),
)
def told_apart(
    losses: Sequence[Mapping[tuple, Perplexity]],
    *,
    sites: str,
    ratio: float,
    text: str | Sequence[str],
) -> pd.DataFrame:
    """Compare neighbouring methods, from best to worst, at one size on one text or several.

    Two methods differ if p, over passages and corrected for all rows of the table, is below 0.05
    and the difference has one sign in every calibration sample. p is for these samples, whose
    losses are averaged; what other samples would give only the signs tell: equal methods have one
    sign in all of *k* samples in ``2^(1 - k)`` of cases.

    Parameters
    ----------
    losses : sequence of mapping
        From `method_comparison`, one per calibration sample.
    sites, ratio, text
        The cells to compare.

    Returns
    -------
    pandas.DataFrame
        That of `lab.compare` (losses of a passage are means over the samples), with ``samples``: on
        how many calibration samples the difference has this sign, ``signs``: of how many
        (``"2 of 3"``), and ``text``.

    Raises
    ------
    ValueError
        If a method is not in all samples, or its samples were measured differently.
    """
    tables = []
    for name in [text] if isinstance(text, str) else text:
        by_method = _by_method(losses, (sites, ratio, name))
        means = {method: _mean(each, method) for method, each in by_method.items()}
        table = paired_differences(means, "neighbours", level=_LEVEL)
        table["samples"] = [_agreeing(row, by_method) for row in table.to_dict("records")]
        tables.append(table.assign(text=name))
    table = corrected(pd.concat(tables, ignore_index=True), _LEVEL)
    table["differ"] &= table["samples"] == len(losses)
    signs = table["samples"].map(f"{{}} of {len(losses)}".format)
    table.insert(len(table.columns) - 1, "signs", signs)
    return table


def _by_method(
    losses: Sequence[Mapping[tuple, Perplexity]], cell: tuple
) -> dict[str, list[Perplexity]]:
    """Losses of every method at one size on one text, one per calibration sample."""
    found: dict[str, list[Perplexity]] = {}
    for sample in losses:
        for (name, *place), loss in sample.items():
            if tuple(place) == cell:
                found.setdefault(name, []).append(loss)
    for name, each in found.items():
        if len(each) < len(losses):
            raise ValueError(
                f"{name} is in {len(each)} of {len(losses)} calibration samples; every method must "
                "be in all of them"
            )
    return found


def _mean(losses: Sequence[Perplexity], name: str) -> Perplexity:
    """One perplexity whose `passages` are means; its other numbers are those of the first."""
    for loss in losses[1:]:
        require_one_protocol(losses[0], loss, f"two calibration samples of {name}")
    return replace(losses[0], passages=np.mean([loss.passages for loss in losses], axis=0))


def _agreeing(row: dict, by_method: Mapping[str, Sequence[Perplexity]]) -> int:
    """On how many samples the second method is worse (or better), as over all of them."""
    per = 1 if row["unit"] == "nats per token" else 2
    first, second = (
        np.array([loss.passages[:, 0].sum() / loss.passages[:, per].sum() for loss in losses])
        for losses in (by_method[row["first"]], by_method[row["second"]])
    )
    return int((np.sign(second - first) == np.sign(row["difference"])).sum())


@checked(losses=DictOf(Instance(tuple), Instance(Perplexity), 1))
def by_seed(losses: Mapping[tuple, Perplexity]) -> list[dict[tuple, Perplexity]]:
    """The losses of every seed of `gradient_methods`, with its number taken out of the names.

    Parameters
    ----------
    losses : mapping
        From `method_comparison`; a method without seeds is in every entry.

    Returns
    -------
    list of dict
        As `told_apart` takes them.
    """
    seeds = {found[0] for name, *_ in losses if (found := _SEED.findall(name))}
    return [
        {
            (_SEED.sub("", name), *place): loss
            for (name, *place), loss in losses.items()
            if _SEED.findall(name) in ([], [seed])
        }
        for seed in sorted(seeds, key=int)
    ]
