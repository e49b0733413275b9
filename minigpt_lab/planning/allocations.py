"""Allocation of a ratio over layers: the same everywhere, by depth, or by the scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from ..checks import Function, InvalidArgument, ListOf, Number, as_json, suggest
from .layer_sites import LayerSite

Allocation = Callable[[float, Sequence[LayerSite]], Sequence[float]]


def uniform(ratio: float, layer_sites: Sequence[LayerSite]) -> list[float]:
    """The same share of every layer."""
    return [ratio] * len(layer_sites)


def log_increase(ratio: float, layer_sites: Sequence[LayerSite]) -> list[float]:
    """``r_i = r_0 + (r_n-1 - r_0) log(i + 1) / log(n)`` (SlimGPT, arXiv 2412.18110, eq. 6).

    With ``r_n-1 = 4 r_0`` as in its pair for 20 %, 0.0625 to 0.25, scaled to the ratio; the
    authors' pairs for other ratios are not published.
    """
    return _by_depth(ratio, layer_sites, lambda i, n: math.log(i + 1) / math.log(n))


def linear_increase(ratio: float, layer_sites: Sequence[LayerSite]) -> list[float]:
    """``r_i = r_0 + (r_n-1 - r_0) i / (n - 1)`` with ``r_n-1 = 4 r_0``, scaled to the ratio."""
    return _by_depth(ratio, layer_sites, lambda i, n: i / (n - 1))


def log_decrease(ratio: float, layer_sites: Sequence[LayerSite]) -> list[float]:
    """`log_increase` from the other end: an ablation of SlimGPT."""
    return _by_depth(ratio, layer_sites, lambda i, n: math.log(n - i) / math.log(n))


def linear_decrease(ratio: float, layer_sites: Sequence[LayerSite]) -> list[float]:
    """`linear_increase` from the other end: an ablation of SlimGPT."""
    return _by_depth(ratio, layer_sites, lambda i, n: 1 - i / (n - 1))


def _by_depth(
    ratio: float, layer_sites: Sequence[LayerSite], progress: Callable[[int, int], float]
) -> list[float]:
    """Shares ``r_0 + 3 r_0 · progress(i, n)`` with r_0 such that their mean is the ratio."""
    steps = [progress(each.layer, each.depth) if each.depth > 1 else 1.0 for each in layer_sites]
    return _scaled(0.25 + 0.75 * np.array(steps), layer_sites, ratio)


def _scaled(weights: np.ndarray, layer_sites: Sequence[LayerSite], ratio: float) -> list[float]:
    """Shares in proportion to weights, none above 1, whose mean over parameters is the ratio."""
    sizes = np.array([each.parameters for each in layer_sites])
    shares, full = np.zeros(len(weights)), np.zeros(len(weights), bool)
    for _ in weights:  # every round fills those that would exceed 1, and scales the others anew
        remaining = ratio * sizes.sum() - sizes[full].sum()
        scale = remaining / max((weights * sizes)[~full].sum(), 1e-300)
        shares = np.where(full, 1.0, weights * scale)
        if not (shares > 1).any():
            break
        full |= shares > 1
    return list(np.clip(shares, 0, 1))


def global_ranking(ratio: float, layer_sites: Sequence[LayerSite]) -> list[float]:
    """The lowest scores *per parameter*, wherever they are, across layers and sites.

    For one site with units of one cost that is a single threshold on the score: with contextual
    scores one absolute ε for all layers, as in Mini-GPTs (see `Scores.highest_pruned`).
    """
    return _ranked(ratio, layer_sites, [each.scores / each.cost for each in layer_sites])


def global_standardised(ratio: float, layer_sites: Sequence[LayerSite]) -> list[float]:
    """The lowest z-scores within site and layer, wherever they are, for any criterion.

    The idea of FLAP's adaptive structure (2312.11983), which standardises features instead of
    units: see `global_as_scored`.
    """
    keys = [(each.scores - each.scores.mean()) / (each.scores.std() or 1.0) for each in layer_sites]
    return _ranked(ratio, layer_sites, keys)


def global_as_scored(ratio: float, layer_sites: Sequence[LayerSite]) -> list[float]:
    """The lowest scores as they are, for criteria whose layers and sites can be compared.

    With standardised `fluctuation` scores this is FLAP's adaptive global structure (AL-AM,
    2312.11983): all heads and channels in one ranking, until their parameters make up the ratio.
    The paper counts a head as 512/3 channels, the ratio of their weights there; here every unit
    counts the parameters that are removed with it.
    """
    return _ranked(ratio, layer_sites, [each.scores for each in layer_sites])


def _ranked(
    ratio: float, layer_sites: Sequence[LayerSite], keys: Sequence[np.ndarray]
) -> list[float]:
    """Share of each layer site among the lowest keys that hold the ratio of the parameters."""
    owner = np.repeat(np.arange(len(layer_sites)), [len(each) for each in layer_sites])
    cost = np.array([each.cost for each in layer_sites], float)[owner]
    key = np.concatenate(keys)
    order = np.argsort(key, kind="stable")
    # a unit is pruned if more than half of it fits, and with it all that score the same
    fits = np.cumsum(cost[order]) - cost[order] / 2 < ratio * cost.sum()
    pruned = key <= key[order][fits].max(initial=-np.inf)
    counts = np.bincount(owner[pruned], minlength=len(layer_sites))
    return [count / len(each) for count, each in zip(counts, layer_sites, strict=True)]


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
#: From a ratio and layer sites to one share of units for each of them.
ALLOCATIONS = {**BY_DEPTH, **RANKINGS}


def allocation_rule(allocation: str | Allocation | Sequence[float]) -> Allocation:
    """The rule of this name, with these shares per layer, or a user's function, checked.

    Raises
    ------
    ValueError
        If the name is unknown.
    """
    if callable(allocation):
        return _checked_rule(Function()("allocation", allocation))
    if isinstance(allocation, str) and allocation in ALLOCATIONS:
        return ALLOCATIONS[allocation]
    if isinstance(allocation, Iterable) and not isinstance(allocation, str):
        return _listed(ListOf(Number(0), 1)("allocation", allocation))
    shown = " ".join(repr(allocation).split())[:60]
    hint = suggest(str(allocation), list(ALLOCATIONS))
    raise InvalidArgument(f"unknown allocation {shown}; {hint}")


def _checked_rule(allocation: Allocation) -> Allocation:
    """A user's rule whose shares are checked: one number for each layer site."""

    def rule(ratio: float, layer_sites: Sequence[LayerSite]) -> list[float]:
        name = f"{allocation_name(allocation)}({ratio:.3g}, layer_sites)"
        shares = ListOf(Number())(name, allocation(ratio, layer_sites))
        if len(shares) != len(layer_sites):
            raise InvalidArgument(
                f"{name} gives {len(shares)} shares; expected one for each of {len(layer_sites)} "
                "layer sites"
            )
        return list(shares)

    return rule


def _listed(shares: Sequence[float]) -> Allocation:
    """One share per layer of the model, scaled to the ratio."""

    def rule(ratio: float, layer_sites: Sequence[LayerSite]) -> list[float]:
        depth = layer_sites[0].depth
        if len(shares) != depth or max(shares) <= 0:
            raise ValueError(
                f"the allocation lists {len(shares)} shares from {min(shares)} to {max(shares)}; "
                f"expected one of at least 0 for each of {depth} layers"
            )
        weights = np.array([shares[each.layer] for each in layer_sites], float)
        return _scaled(weights, layer_sites, ratio)

    return rule


def allocation_name(allocation: str | Allocation | Sequence[float]) -> str | list[float]:
    """Name of an allocation in a plan's origin."""
    if callable(allocation):
        return getattr(allocation, "__name__", "own")
    return allocation if isinstance(allocation, str) else as_json([*allocation])
