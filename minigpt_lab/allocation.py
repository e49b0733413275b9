"""From scores to a plan: how much leaves in all, and how that is spread over layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedModel

from .assets import nearest
from .criteria import Scores
from .families import SITES, Anatomy
from .plan import PruningPlan, whole
from .sizes import layer_parameters

RATIOS = ("units", "decoder", "model")


@dataclass(frozen=True)
class Group:
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


Allocation = Callable[[float, Sequence[Group]], Sequence[float]]


def uniform(ratio: float, groups: Sequence[Group]) -> list[float]:
    """The same share of every layer."""
    return [ratio] * len(groups)


def log_increase(ratio: float, groups: Sequence[Group]) -> list[float]:
    """Shares that grow with log(i + 1), last four times the first (SlimGPT, 2412.18110, eq. 6).

    Its 20 % pair, 0.0625 to 0.25, scaled to the ratio; the authors' pairs for other ratios are not
    published.
    """
    return _increase(ratio, groups, lambda i, n: math.log(i + 1) / math.log(n))


def linear_increase(ratio: float, groups: Sequence[Group]) -> list[float]:
    """Shares that grow with the layer's index, last four times the first."""
    return _increase(ratio, groups, lambda i, n: i / (n - 1))


def log_decrease(ratio: float, groups: Sequence[Group]) -> list[float]:
    """`log_increase` from the other end: an ablation of SlimGPT."""
    return _increase(ratio, groups, lambda i, n: math.log(n - i) / math.log(n))


def linear_decrease(ratio: float, groups: Sequence[Group]) -> list[float]:
    """`linear_increase` from the other end: an ablation of SlimGPT."""
    return _increase(ratio, groups, lambda i, n: 1 - i / (n - 1))


def _increase(ratio, groups, progress: Callable[[int, int], float]) -> list[float]:
    steps = [progress(g.layer, g.depth) if g.depth > 1 else 1.0 for g in groups]
    weights = 0.25 + 0.75 * np.array(steps)
    return list(_scaled(weights, _sizes(groups), ratio))


def _sizes(groups: Sequence[Group]) -> np.ndarray:
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


def global_ranking(ratio: float, groups: Sequence[Group]) -> list[float]:
    """The lowest scores *per parameter*, wherever they are, across layers and sites.

    For one site with units of one cost that is a single threshold on the score: with contextual
    scores one absolute ε for all layers, as in Mini-GPTs (see `Scores.highest_cut`).
    """
    return _ranked(ratio, groups, [group.scores / group.cost for group in groups])


def global_standardised(ratio: float, groups: Sequence[Group]) -> list[float]:
    """The lowest z-scores within site and layer, wherever they are, for any criterion.

    The idea of FLAP's adaptive structure (2312.11983), which standardises features instead of
    units: see `global_as_scored`.
    """
    keys = [(g.scores - g.scores.mean()) / (g.scores.std() or 1.0) for g in groups]
    return _ranked(ratio, groups, keys)


def global_as_scored(ratio: float, groups: Sequence[Group]) -> list[float]:
    """The lowest scores as they are, for criteria whose layers and sites can be compared.

    With standardised `fluctuation` scores this is FLAP's adaptive global structure (AL-AM,
    2312.11983): all heads and channels in one ranking, until their parameters make up the ratio.
    The paper counts a head as 512/3 channels, which is what their weights amount to there; here
    every unit counts the parameters that leave with it.
    """
    return _ranked(ratio, groups, [group.scores for group in groups])


def _ranked(ratio: float, groups: Sequence[Group], keys: Sequence[np.ndarray]) -> list[float]:
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


#: How a ratio is spread: ``(ratio, groups)`` to one share of units per group.
ALLOCATIONS: dict[str, Allocation] = {
    "uniform": uniform,
    "log-increase": log_increase,
    "linear-increase": linear_increase,
    "log-decrease": log_decrease,
    "linear-decrease": linear_decrease,
    "global": global_ranking,
    "global-standardised": global_standardised,
    "global-as-scored": global_as_scored,
}


def plan_from_scores(
    model: PreTrainedModel,
    scores: Scores,
    ratio: float | None = None,
    parameters: int | None = None,
    threshold: float | None = None,
    allocation: str | Allocation | Sequence[float] = "uniform",
    ratio_of: str = "units",
    keep_layers: tuple[int, int] = (0, 0),
    multiple_of: int | Mapping[str, int] = 1,
) -> PruningPlan:
    """Cut the units with the lowest scores.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        The model that was scored.
    scores : Scores
        From `score`.
    ratio : float, optional
        Share to remove; of what, says `ratio_of`.
    parameters : int, optional
        Largest number of stored parameters the model may have: the smallest cut that meets it.
    threshold : float, optional
        Remove units with a score at or below this. Give exactly one of these three.
    allocation : str, callable or sequence of float
        How it is spread over layers: a key of `ALLOCATIONS`, a function from a ratio and a list of
        `Group` to one share of units per group, or one share per layer, scaled to the ratio.
    ratio_of : {"units", "decoder", "model"}
        What `ratio` is a share of: the scored units of the layers that may lose some (counted in
        their parameters), the decoder layers' parameters, or all of the model's.
    keep_layers : (int, int)
        Numbers of first and last layers to leave whole.
    multiple_of : int or mapping
        Round the FFN channels that stay (or each site's units) to multiples of this.

    Returns
    -------
    PruningPlan
        Every layer keeps at least one unit per site. A target is met to within one unit per layer
        and site (and `multiple_of`); ``origin["removed"]`` has the share reached under all three
        meanings.

    Raises
    ------
    ValueError
        If not exactly one target is given, it cannot be met, or a count is out of range.
    """
    targets = {"ratio": ratio, "parameters": parameters, "threshold": threshold}
    chosen = {name: value for name, value in targets.items() if value is not None}
    if len(chosen) != 1:
        raise ValueError(
            f"give exactly one of ratio, parameters, threshold; got {chosen or 'none'}"
        )
    scores.require(model)
    anatomy = Anatomy(model)
    groups = prunable(anatomy, scores.values, keep_layers)
    if threshold is not None:
        if math.isnan(threshold):
            raise ValueError("threshold is NaN; expected a number")
        gone = [int((group.scores <= threshold).sum()) for group in groups]
        counts = _whole_units(groups, gone, _steps(groups, multiple_of))
    else:
        counts = unit_counts(model, groups, ratio, parameters, allocation, ratio_of, multiple_of)
    origin = {"method": scores.criterion, **scores.options, **chosen, "keep_layers": [*keep_layers]}
    origin |= {"allocation": allocation_name(allocation), "ratio_of": ratio_of}
    origin["removed"] = removed_shares(model, groups, counts)
    return _plan(model, anatomy, scores, groups, counts, origin)


def unit_counts(
    model: PreTrainedModel,
    groups: Sequence[Group],
    ratio: float | None,
    parameters: int | None,
    allocation: str | Allocation | Sequence[float],
    ratio_of: str = "units",
    multiple_of: int | Mapping[str, int] = 1,
    even_out: bool = False,
) -> list[int]:
    """How many units leave each group, for a ratio or a size: see `plan_from_scores`.

    Parameters
    ----------
    groups : sequence of Group
        From `prunable`.
    even_out : bool
        Let a layer's FFN channels take up what whole heads leave too much or too little.

    Raises
    ------
    ValueError
        As `plan_from_scores` does.
    """
    spread, steps = _allocation(allocation), _steps(groups, multiple_of)
    dense = sum(parameter.numel() for parameter in model.parameters())
    if ratio is not None and not 0 <= ratio < 1:
        raise ValueError(f"ratio is {ratio}; expected a share of {ratio_of} in [0, 1)")
    if ratio_of not in RATIOS:
        raise ValueError(f"unknown ratio_of {ratio_of!r}; {nearest(ratio_of, list(RATIOS))}")

    def counts_at(share: float) -> list[int]:
        shares = spread(share, groups)
        gone = [s * len(group) for s, group in zip(shares, groups, strict=True)]
        counts = _whole_units(groups, gone, steps)
        return _evened(groups, gone, counts, steps) if even_out else counts

    if ratio is not None and ratio_of == "units":
        return counts_at(ratio)
    base = layer_parameters(model) if ratio_of == "decoder" else dense
    leave = dense - parameters if ratio is None else ratio * base
    return _solve(counts_at, groups, leave, dense, exceed=ratio is None)


def _evened(
    groups: Sequence[Group], gone: Sequence[float], counts: Sequence[int], steps: Sequence[int]
) -> list[int]:
    """Counts whose FFN channels make up, layer by layer, for heads rounded to whole ones."""
    owed: dict[int, float] = {}
    for group, wish, count in zip(groups, gone, counts, strict=True):
        if group.site != "ffn":
            owed[group.layer] = owed.get(group.layer, 0) + (wish - count) * group.cost
    wishes = [
        min(max(wish + owed.get(group.layer, 0) / group.cost, 0), len(group))
        if group.site == "ffn"
        else count
        for group, wish, count in zip(groups, gone, counts, strict=True)
    ]
    return _whole_units(groups, wishes, steps)


def prunable(
    anatomy: Anatomy, scores: Mapping[str, Sequence[np.ndarray]], keep_layers: tuple[int, int]
) -> list[Group]:
    """The groups of units, of every scored site, that are in layers which may lose some.

    Raises
    ------
    ValueError
        If `keep_layers` leaves none.
    """
    depth, (first, last) = len(anatomy.layers), keep_layers
    if min(keep_layers) < 0 or first + last >= depth:
        raise ValueError(f"keep_layers={keep_layers} leaves nothing of {depth} layers")
    return [
        Group(site, layer, depth, layers[layer], anatomy.unit_parameters(site, layer))
        for site, layers in scores.items()
        for layer in range(first, depth - last)
    ]


def _steps(groups: Sequence[Group], multiple_of: int | Mapping[str, int]) -> list[int]:
    """For each group, what the number of staying units must be a multiple of."""
    per_site = multiple_of if isinstance(multiple_of, Mapping) else {"ffn": multiple_of}
    steps = [per_site.get(group.site, 1) for group in groups]
    for group, step in zip(groups, steps, strict=True):
        if step < 1 or len(group) % step:
            raise ValueError(
                f"multiple_of is {step}, which does not divide the {len(group)} {group.site} units "
                f"of layer {group.layer}; choose one of its divisors"
            )
    return steps


def _allocation(allocation: str | Allocation | Sequence[float]) -> Allocation:
    if callable(allocation):
        return allocation
    if not isinstance(allocation, str):
        return _given(allocation)
    if allocation not in ALLOCATIONS:
        hint = nearest(allocation, list(ALLOCATIONS))
        raise ValueError(f"unknown allocation {allocation!r}; {hint}")
    return ALLOCATIONS[allocation]


def allocation_name(allocation: str | Allocation | Sequence[float]) -> str | list[float]:
    """What stands for an allocation in a plan's origin."""
    if callable(allocation):
        return getattr(allocation, "__name__", "own")
    return allocation if isinstance(allocation, str) else [*allocation]


def _given(shares: Sequence[float]) -> Allocation:
    """One share per layer of the model, scaled to the ratio."""

    def spread(ratio: float, groups: Sequence[Group]) -> list[float]:
        if len(shares) != groups[0].depth or min(shares) < 0 or max(shares) <= 0:
            raise ValueError(
                f"the allocation lists {len(shares)} shares from {min(shares)} to {max(shares)}; "
                f"expected one of at least 0 for each of {groups[0].depth} layers"
            )
        weights = np.array([shares[group.layer] for group in groups], float)
        return list(_scaled(weights, _sizes(groups), ratio))

    return spread


def _whole_units(groups: Sequence[Group], gone: Sequence[float], steps: Sequence[int]) -> list[int]:
    """Numbers of units that leave: whole, in steps, and never all."""
    counts = []
    for group, lost, step in zip(groups, gone, steps, strict=True):
        if not -1e-9 <= lost <= len(group) + 1e-9:
            raise ValueError(
                f"the allocation takes {lost / len(group):.3g} of layer {group.layer}'s "
                f"{group.site} units; expected a share in [0, 1]"
            )
        stay = round((len(group) - lost) / step) * step
        counts.append(len(group) - max(stay, step))
    return counts


def _solve(counts_at, groups, leave: float, dense: int, exceed: bool) -> list[int]:
    """Counts whose parameters add up to `leave`, by bisection on the ratio.

    `exceed` asks for at least as many; otherwise the nearer of the two neighbours is taken.
    """

    def total(counts: Sequence[int]) -> int:
        return sum(n * group.cost for n, group in zip(counts, groups, strict=True))

    low, high = 0.0, 1.0
    none, most = counts_at(low), counts_at(high)
    if leave > total(most):
        raise ValueError(
            f"the target cannot be met: {leave:,.0f} parameters would leave, but with one unit "
            f"left per layer the model still stores {dense - total(most):,} of {dense:,}, "
            f"{total(most) / dense:.1%} less"
        )
    if leave <= total(none):
        return none
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (low, middle) if total(counts_at(middle)) >= leave else (middle, high)
    below, above = counts_at(low), counts_at(high)
    if exceed or total(above) - leave <= leave - total(below):
        return above
    return below


def removed_shares(
    model: PreTrainedModel, groups: Sequence[Group], counts: Sequence[int]
) -> dict[str, float]:
    """Shares that leave under the three meanings of a ratio."""
    gone = sum(n * group.cost for n, group in zip(counts, groups, strict=True))
    bases = {
        "units": sum(len(group) * group.cost for group in groups),
        "decoder": layer_parameters(model),
        "model": sum(parameter.numel() for parameter in model.parameters()),
    }
    return {name: round(gone / base, 6) for name, base in bases.items()}


def _plan(model, anatomy, scores, groups, counts, origin) -> PruningPlan:
    keep = whole(anatomy, dict.fromkeys((*SITES, *scores.values)))
    for group, gone in zip(groups, counts, strict=True):
        ranked = np.argsort(group.scores, kind="stable")
        keep[group.site][group.layer] = np.sort(ranked[gone:]).tolist()
    units = {site: anatomy.units(site) for site in keep}
    rows = model.get_input_embeddings().weight.shape[0]
    return PruningPlan(scores.model_hash, units, keep, vocabulary_size=rows, origin=origin)
