"""How a ratio is spread over layers: the same everywhere, by depth, or by the scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ..checks import InvalidArgument, ListOf, Number, as_json, suggest


@dataclass(frozen=True)
class LayerSite:
    """The units of one site in one layer that may lose some.

    Parameters
    ----------
    site : str
        ``"ffn"`` or ``"attention"``.
    layer, depth : int
        Index of the layer, and the number of layers of the model.
    scores : numpy.ndarray
        Importance ``[unit]``.
    cost : int
        Parameters that leave with one unit.
    """

    site: str
    layer: int
    depth: int
    scores: np.ndarray
    cost: int

    def __len__(self) -> int:
        return len(self.scores)


Allocation = Callable[[float, Sequence[LayerSite]], Sequence[float]]


def uniform(ratio: float, groups: Sequence[LayerSite]) -> list[float]:
    """The same share of every layer."""
    return [ratio] * len(groups)


def log_increase(ratio: float, groups: Sequence[LayerSite]) -> list[float]:
    """Shares that grow with log(i + 1), last four times the first (SlimGPT, 2412.18110, eq. 6).

    Its 20 % pair, 0.0625 to 0.25, scaled to the ratio; the authors' pairs for other ratios are not
    published.
    """
    return _increase(ratio, groups, lambda i, n: math.log(i + 1) / math.log(n))


def linear_increase(ratio: float, groups: Sequence[LayerSite]) -> list[float]:
    """Shares that grow with the layer's index, last four times the first."""
    return _increase(ratio, groups, lambda i, n: i / (n - 1))


def log_decrease(ratio: float, groups: Sequence[LayerSite]) -> list[float]:
    """`log_increase` from the other end: an ablation of SlimGPT."""
    return _increase(ratio, groups, lambda i, n: math.log(n - i) / math.log(n))


def linear_decrease(ratio: float, groups: Sequence[LayerSite]) -> list[float]:
    """`linear_increase` from the other end: an ablation of SlimGPT."""
    return _increase(ratio, groups, lambda i, n: 1 - i / (n - 1))


def _increase(ratio, groups, progress: Callable[[int, int], float]) -> list[float]:
    steps = [progress(g.layer, g.depth) if g.depth > 1 else 1.0 for g in groups]
    weights = 0.25 + 0.75 * np.array(steps)
    return list(_scaled(weights, _sizes(groups), ratio))


def _sizes(groups: Sequence[LayerSite]) -> np.ndarray:
    return np.array([len(group) * group.cost for group in groups])


def _scaled(weights: np.ndarray, sizes: np.ndarray, ratio: float) -> np.ndarray:
    """Shares in proportion to weights, none above 1, whose mean over parameters is the ratio."""
    shares, full = np.zeros(len(weights)), np.zeros(len(weights), bool)
    for _ in weights:
        open_share = ratio * sizes.sum() - sizes[full].sum()
        scale = open_share / max((weights * sizes)[~full].sum(), 1e-300)
        shares = np.where(full, 1.0, weights * scale)
        if not (shares > 1).any():
            break
        full |= shares > 1
    return np.clip(shares, 0, 1)


def global_ranking(ratio: float, groups: Sequence[LayerSite]) -> list[float]:
    """The lowest scores *per parameter*, wherever they are, across layers and sites.

    For one site with units of one cost that is a single threshold on the score: with contextual
    scores one absolute ε for all layers, as in Mini-GPTs (see `Scores.highest_pruned`).
    """
    return _ranked(ratio, groups, [group.scores / group.cost for group in groups])


def global_standardised(ratio: float, groups: Sequence[LayerSite]) -> list[float]:
    """The lowest z-scores within site and layer, wherever they are, for any criterion.

    The idea of FLAP's adaptive structure (2312.11983), which standardises features instead of
    units: see `global_as_scored`.
    """
    keys = [(g.scores - g.scores.mean()) / (g.scores.std() or 1.0) for g in groups]
    return _ranked(ratio, groups, keys)


def global_as_scored(ratio: float, groups: Sequence[LayerSite]) -> list[float]:
    """The lowest scores as they are, for criteria whose layers and sites can be compared.

    With standardised `fluctuation` scores this is FLAP's adaptive global structure (AL-AM,
    2312.11983): all heads and channels in one ranking, until their parameters make up the ratio.
    The paper counts a head as 512/3 channels, which is what their weights amount to there; here
    every unit counts the parameters that leave with it.
    """
    return _ranked(ratio, groups, [group.scores for group in groups])


def _ranked(ratio: float, groups: Sequence[LayerSite], keys: Sequence[np.ndarray]) -> list[float]:
    """Share of each group among the lowest keys that together hold a ratio of the parameters."""
    owner = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
    cost = np.array([group.cost for group in groups], float)[owner]
    key = np.concatenate(keys)
    order = np.argsort(key, kind="stable")
    # a unit goes if more than half of it fits, and with it all that score the same
    fits = np.cumsum(cost[order]) - cost[order] / 2 < ratio * cost.sum()
    leaves = key <= key[order][fits].max(initial=-np.inf)
    gone = np.bincount(owner[leaves], minlength=len(groups))
    return [count / len(group) for count, group in zip(gone, groups, strict=True)]


#: By a layer's depth alone.
BY_DEPTH: dict[str, Allocation] = {
    "uniform": uniform,
    "log-increase": log_increase,
    "linear-increase": linear_increase,
    "log-decrease": log_decrease,
    "linear-decrease": linear_decrease,
}
#: By the scores of all units together.
RANKINGS: dict[str, Allocation] = {
    "global": global_ranking,
    "global-standardised": global_standardised,
    "global-as-scored": global_as_scored,
}
#: How a ratio is spread: ``(ratio, groups)`` to one share of units per group.
ALLOCATIONS = {**BY_DEPTH, **RANKINGS}


def allocation_rule(allocation: str | Allocation | Sequence[float]) -> Allocation:
    """A rule by its name, from one share per layer, or as it is.

    Raises
    ------
    ValueError
        If the name is unknown.
    """
    if callable(allocation):
        return _answering(allocation)
    if not isinstance(allocation, str) and isinstance(allocation, Iterable):
        return _given(ListOf(Number(0), 1)("allocation", allocation))
    if not isinstance(allocation, str) or allocation not in ALLOCATIONS:
        shown = " ".join(repr(allocation).split())[:60]
        hint = suggest(str(allocation), list(ALLOCATIONS))
        raise InvalidArgument(f"unknown allocation {shown}; {hint}")
    return ALLOCATIONS[allocation]


def _answering(allocation: Allocation) -> Allocation:
    """A user's rule whose shares are checked: one number for each group."""

    def spread(ratio: float, groups: Sequence[LayerSite]) -> list[float]:
        name = f"{allocation_name(allocation)}({ratio:.3g}, groups)"
        shares = ListOf(Number())(name, allocation(ratio, groups))
        if len(shares) != len(groups):
            raise InvalidArgument(
                f"{name} gives {len(shares)} shares; expected one for each of {len(groups)} groups"
            )
        return list(shares)

    return spread


def allocation_name(allocation: str | Allocation | Sequence[float]) -> str | list[float]:
    """What stands for an allocation in a plan's origin."""
    if callable(allocation):
        return getattr(allocation, "__name__", "own")
    return allocation if isinstance(allocation, str) else as_json([*allocation])


def _given(shares: Sequence[float]) -> Allocation:
    """One share per layer of the model, scaled to the ratio."""

    def spread(ratio: float, groups: Sequence[LayerSite]) -> list[float]:
        if len(shares) != groups[0].depth or min(shares) < 0 or max(shares) <= 0:
            raise ValueError(
                f"the allocation lists {len(shares)} shares from {min(shares)} to {max(shares)}; "
                f"expected one of at least 0 for each of {groups[0].depth} layers"
            )
        weights = np.array([shares[group.layer] for group in groups], float)
        return list(_scaled(weights, _sizes(groups), ratio))

    return spread
