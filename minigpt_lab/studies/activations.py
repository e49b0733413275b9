"""FFN activations of several domains: one table, unused neurons, their overlap."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate

import numpy as np
import pandas as pd

from ..calibration import Statistics
from ..checks import DictOf, ListOf, Number, Text, checked
from .arguments import STATISTICS


@checked(statistics=DictOf(Text(), STATISTICS, 1))
def activation_frame(statistics: Mapping[str, Statistics]) -> pd.DataFrame:
    """FFN activations of several domains in one table: ``domain, layer, neuron, mean_abs``."""
    parts = [
        pd.DataFrame({"domain": domain, "layer": layer, "neuron": range(len(row)), "mean_abs": row})
        for domain, found in statistics.items()
        for layer, row in enumerate(_activations(found))
    ]
    return pd.concat(parts, ignore_index=True)


def _activations(statistics: Statistics) -> list[np.ndarray]:
    return [statistics.mean(name, "input", "absolute") for name in statistics.activations]


@checked(
    samples=DictOf(Text(), ListOf(STATISTICS, 2), 1),
    epsilon=Number(0) | None,
    quantile=Number(0, below=1) | None,
)
def neuron_overlap(
    samples: Mapping[str, Sequence[Statistics]],
    *,
    epsilon: float | None = None,
    quantile: float | None = None,
) -> pd.DataFrame:
    """Overlap of the FFN neurons that two domains do not use.

    Every domain has two or more samples (statistics of disjoint text of equal length). A pair of
    domains is compared sample against sample; a domain with itself, one sample against another:
    that is the noise floor that contextual differences must stand out from.

    Parameters
    ----------
    samples : mapping
        Domain to its samples.
    epsilon : float, optional
        A neuron is unused if its mean |activation| is at or below this.
    quantile : float, optional
        Or: if it is among this share of the lowest of its layer. Give one of the two.

    Returns
    -------
    pandas.DataFrame
        Columns ``domain, other, jaccard`` (intersection over union, all layers together; NaN if
        nothing is unused), ``chance`` (expected for random sets of the same sizes), ``unused``
        (share of neurons).

    Raises
    ------
    ValueError
        If not exactly one rule is given, or a domain has fewer than two samples.
    """
    if (epsilon is None) == (quantile is None):
        raise ValueError(f"give epsilon or quantile, not both or none: {epsilon}, {quantile}")
    unused = {
        domain: [_unused(_activations(sample), epsilon, quantile) for sample in found]
        for domain, found in samples.items()
    }
    return set_overlap(unused).rename(columns={"size": "unused"})


def set_overlap(samples: Mapping[str, Sequence[list[np.ndarray]]]) -> pd.DataFrame:
    """Jaccard overlap of sets given as flags ``[member]`` per layer, mean over pairs of samples.

    Returns
    -------
    pandas.DataFrame
        ``domain, other, jaccard, chance, size`` (share of members in the set); a domain with itself
        is one sample against another.
    """
    rows = []
    for domain, own in samples.items():
        for other, foreign in samples.items():
            pairs = [
                _jaccard(a, b)
                for i, a in enumerate(own)
                for j, b in enumerate(foreign)
                if domain != other or i < j
            ]
            jaccard, chance = np.mean(pairs, axis=0)
            share = np.mean([np.concatenate(layers).mean() for layers in own])
            rows.append([domain, other, jaccard, chance, share])
    return pd.DataFrame(rows, columns=["domain", "other", "jaccard", "chance", "size"])


@checked(pieces=DictOf(Text(), ListOf(STATISTICS, 1), 1), quantile=Number(0, below=1))
def calibration_stability(
    pieces: Mapping[str, Sequence[Statistics]], quantile: float
) -> pd.DataFrame:
    """Overlap of the kept FFN neurons with the final set as the calibration text grows.

    Statistics add up, so one pass over disjoint pieces of a text gives those of all its beginnings.
    Each beginning's set is compared with that of the whole text, which contains it: the last is
    equal by construction, and the others are flattered a little.

    Parameters
    ----------
    pieces : mapping
        Domain to statistics of consecutive, disjoint pieces of its text.
    quantile : float
        A neuron is kept if it is not among this share of the lowest of its layer.

    Returns
    -------
    pandas.DataFrame
        Columns ``domain, tokens, jaccard, chance``, one row per beginning.
    """
    rows = []
    for domain, found in pieces.items():
        kept = [
            [~layer for layer in _unused(_activations(beginning), None, quantile)]
            for beginning in accumulate(found)
        ]
        tokens = accumulate(piece.n_tokens for piece in found)
        rows += [
            [domain, n, *_jaccard(layers, kept[-1])] for n, layers in zip(tokens, kept, strict=True)
        ]
    return pd.DataFrame(rows, columns=["domain", "tokens", "jaccard", "chance"])


def _unused(layers: list[np.ndarray], epsilon, quantile) -> list[np.ndarray]:
    if epsilon is not None:
        return [layer <= epsilon for layer in layers]
    return [layer <= np.quantile(layer, quantile, method="lower") for layer in layers]


def _jaccard(first: list[np.ndarray], second: list[np.ndarray]) -> tuple[float, float]:
    """Observed and expected intersection over union of two sets of neurons."""
    both = sum(int((a & b).sum()) for a, b in zip(first, second, strict=True))
    expected = sum(a.sum() * b.sum() / len(a) for a, b in zip(first, second, strict=True))
    total = sum(int(layer.sum()) for layer in (*first, *second))
    if total == 0:
        return np.nan, np.nan
    return both / (total - both), expected / (total - expected)
