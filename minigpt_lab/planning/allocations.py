"""Allocation of a ratio over layers: the same everywhere, by depth, or by the scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from ..checks import Function, InvalidArgument, ListOf, Number, OneOf, as_json
from .layer_sites import LayerSite

Allocation = Callable[[float, Sequence[LayerSite]], Sequence[float]]


def _by_depth(progress: Callable[[int, int], float]) -> Allocation:
    """Rule with ``r_i = r_0 + (r_n-1 - r_0) · progress(i, n)`` of layer *i* of *n*.

    ``r_n-1 = 4 r_0``, as in SlimGPT's pair for 20 %, 0.0625 to 0.25, scaled to the ratio; the
    authors' pairs for other ratios are not published.
    """

    def rule(ratio: float, layer_sites: Sequence[LayerSite]) -> list[float]:
        steps = [
            progress(each.layer, each.depth) if each.depth > 1 else 1.0 for each in layer_sites
        ]
        return _scaled(0.25 + 0.75 * np.array(steps), layer_sites, ratio)

    return rule


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


def _ranked(key: Callable[[LayerSite], np.ndarray]) -> Allocation:
    """Rule that prunes the units with the lowest keys, wherever they are, up to the ratio.

    The ratio is of the parameters that are removed with the units.
    """

    def rule(ratio: float, layer_sites: Sequence[LayerSite]) -> list[float]:
        owner = np.repeat(np.arange(len(layer_sites)), [len(each) for each in layer_sites])
        cost = np.array([each.cost for each in layer_sites], float)[owner]
        keys = np.concatenate([key(each) for each in layer_sites])
        order = np.argsort(keys, kind="stable")
        # a unit is pruned if more than half of it fits, and with it all that score the same
        fits = np.cumsum(cost[order]) - cost[order] / 2 < ratio * cost.sum()
        pruned = keys <= keys[order][fits].max(initial=-np.inf)
        counts = np.bincount(owner[pruned], minlength=len(layer_sites))
        return [count / len(each) for count, each in zip(counts, layer_sites, strict=True)]

    return rule


def _standardised(each: LayerSite) -> np.ndarray:
    """z-scores within site and layer."""
    return (each.scores - each.scores.mean()) / (each.scores.std() or 1.0)


#: By a layer's depth alone: the same share of every layer; SlimGPT's rule (arXiv 2412.18110, eq.
#: 6) and a linear one; its ablations, the same from the other end.
BY_DEPTH: dict[str, Allocation] = {
    "uniform": lambda ratio, layer_sites: [ratio] * len(layer_sites),
    "log-increase": _by_depth(lambda i, n: math.log(i + 1) / math.log(n)),
    "linear-increase": _by_depth(lambda i, n: i / (n - 1)),
    "log-decrease": _by_depth(lambda i, n: math.log(n - i) / math.log(n)),
    "linear-decrease": _by_depth(lambda i, n: 1 - i / (n - 1)),
}
#: By the scores of all units together.
RANKINGS: dict[str, Allocation] = {
    # Scores per parameter. For one site with units of one cost that is a single threshold on the
    # score: with contextual scores one absolute ε for all layers, as in Mini-GPTs (see
    # `Scores.highest_pruned`).
    "global": _ranked(lambda each: each.scores / each.cost),
    # For any criterion: the idea of FLAP's adaptive structure (2312.11983), which standardises
    # features instead of units.
    "global-standardised": _ranked(_standardised),
    # For criteria whose layers and sites can be compared. With standardised `fluctuation` scores
    # this is FLAP's adaptive global structure (AL-AM, 2312.11983): all heads and channels in one
    # ranking. The paper counts a head as 512/3 channels, the ratio of their weights there; here
    # every unit counts the parameters that are removed with it.
    "global-as-scored": _ranked(lambda each: each.scores),
}
#: From a ratio and layer sites to one share of units for each of them.
ALLOCATIONS = {**BY_DEPTH, **RANKINGS}
_ALLOCATION = OneOf(ALLOCATIONS) | Function() | ListOf(Number(0), 1)


def allocation_rule(allocation: str | Allocation | Sequence[float]) -> Allocation:
    """The rule of this name, with these shares per layer, or a user's function, checked.

    Raises
    ------
    ValueError
        If it is none of these.
    """
    allocation = _ALLOCATION("allocation", allocation)
    if isinstance(allocation, str):
        return ALLOCATIONS[allocation]
    return _checked_rule(allocation) if callable(allocation) else _listed(allocation)


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
