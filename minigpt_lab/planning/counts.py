"""From scores to a plan: how many units leave every layer, and which."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import numpy as np
from transformers import PreTrainedModel

from ..checks import (
    Instance,
    Integer,
    ListOf,
    Model,
    Number,
    as_json,
    checked,
    invalid,
    suggest,
)
from ..criteria import Scores, check_option
from ..models import ALL_SITES, SITES, Anatomy, PruningPlan, keep_all, layer_parameters
from .allocations import Allocation, LayerSite, allocation_name, allocation_rule

RATIOS = ("units", "decoder", "model")


@checked(
    model=Model(),
    scores=Instance(Scores, "lab.score gives it"),
    ratio=Number() | None,
    parameters=Integer() | None,
    threshold=Number() | None,
)
def plan_from_scores(
    model: PreTrainedModel,
    scores: Scores,
    *,
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
        `LayerSite` to one share of units per group, or one share per layer, scaled to the ratio.
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
    chosen = one_target(ratio=ratio, parameters=parameters, threshold=threshold)
    values = scores.require(model)
    anatomy = Anatomy(model)
    keep_layers = check_keep_layers(keep_layers)
    groups = prunable_sites(anatomy, values, keep_layers)
    if threshold is not None:
        gone = [int((group.scores <= threshold).sum()) for group in groups]
        counts = _whole_units(groups, gone, unit_steps(groups, multiple_of))
    else:
        counts = unit_counts(model, groups, ratio, parameters, allocation, ratio_of, multiple_of)
    origin = {"method": scores.criterion, **as_json(scores.options), **chosen}
    origin |= {"keep_layers": [*keep_layers]}
    origin |= {"allocation": allocation_name(allocation), "ratio_of": ratio_of}
    origin["removed"] = removed_shares(model, groups, counts)
    keep = keep_all(anatomy, dict.fromkeys((*SITES, *values)))
    for group, count in zip(groups, counts, strict=True):
        ranked = np.argsort(group.scores, kind="stable")
        keep[group.site][group.layer] = np.sort(ranked[count:]).tolist()
    units = {site: anatomy.units(site) for site in keep}
    rows = model.get_input_embeddings().weight.shape[0]
    return PruningPlan(scores.model_hash, units, keep, vocabulary_size=rows, origin=origin)


def one_target(**targets) -> dict[str, object]:
    """The one of several targets that is given, by its name.

    Raises
    ------
    ValueError
        If none or several are given.
    """
    chosen = {name: value for name, value in targets.items() if value is not None}
    if len(chosen) != 1:
        raise ValueError(f"give exactly one of {', '.join(targets)}; got {chosen or 'none'}")
    return chosen


def unit_counts(
    model: PreTrainedModel,
    groups: Sequence[LayerSite],
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
    groups : sequence of LayerSite
        From `prunable_sites`.
    even_out : bool
        Let a layer's FFN channels take up what whole heads leave too much or too little.

    Raises
    ------
    ValueError
        As `plan_from_scores` does.
    """
    spread, steps = allocation_rule(allocation), unit_steps(groups, multiple_of)
    leave = parameters_to_remove(model, groups, ratio, parameters, ratio_of)

    def counts_at(share: float) -> list[int]:
        shares = spread(share, groups)
        gone = [s * len(group) for s, group in zip(shares, groups, strict=True)]
        counts = _whole_units(groups, gone, steps)
        return _evened(groups, gone, counts, steps) if even_out else counts

    if ratio is not None and ratio_of == "units":
        if not callable(allocation):
            _check_reached(ratio, spread(ratio, groups), groups)
        counts = counts_at(ratio)
    else:
        dense = sum(parameter.numel() for parameter in model.parameters())
        counts = _solve(counts_at, groups, leave, dense, exceed=ratio is None)
    if leave > 0 and not any(counts):
        warnings.warn(
            f"nothing leaves: {leave:,.0f} parameters are less than half a unit of every layer; "
            "ask for more, or cut units that are smaller too (sites=)",
            stacklevel=3,
        )
    return counts


def _check_reached(ratio: float, shares: Sequence[float], groups: Sequence[LayerSite]) -> None:
    """Refuse shares that fall short of the ratio, and say so if equal scores exceed it."""
    sizes = np.array([len(group) * group.cost for group in groups])
    reached, unit = np.average(shares, weights=sizes), max(group.cost for group in groups)
    if reached < ratio - unit / sizes.sum():
        raise ValueError(
            f"ratio is {ratio}, but the layers that the allocation gives a share hold only "
            f"{reached:.3g} of the units' parameters; expected at most that"
        )
    if reached > ratio + unit / sizes.sum():
        warnings.warn(
            f"{reached:.1%} of the units leave, not {ratio:.1%}: so many share the lowest scores",
            stacklevel=4,
        )


def parameters_to_remove(
    model: PreTrainedModel,
    groups: Sequence[LayerSite],
    ratio: float | None,
    parameters: int | None,
    ratio_of: str = "units",
) -> float:
    """How many parameters are to leave, for a ratio or a size: see `plan_from_scores`.

    Raises
    ------
    ValueError
        If the ratio or its meaning is out of range.
    """
    ratio, parameters = (
        (Number() | None)("ratio", ratio),
        (Integer() | None)("parameters", parameters),
    )
    if ratio is not None and not 0 <= ratio < 1:
        raise ValueError(f"ratio is {ratio}; expected a share of {ratio_of} in [0, 1)")
    check_option("ratio_of", ratio_of, RATIOS)
    bases = _bases(model, groups)
    return bases["model"] - parameters if ratio is None else ratio * bases[ratio_of]


def _bases(model: PreTrainedModel, groups: Sequence[LayerSite]) -> dict[str, int]:
    """Parameters that a ratio can be a share of."""
    return {
        "units": sum(len(group) * group.cost for group in groups),
        "decoder": layer_parameters(model),
        "model": sum(parameter.numel() for parameter in model.parameters()),
    }


def _evened(
    groups: Sequence[LayerSite], gone: Sequence[float], counts: Sequence[int], steps: Sequence[int]
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


def prunable_sites(
    anatomy: Anatomy, scores: Mapping[str, Sequence[np.ndarray]], keep_layers: tuple[int, int]
) -> list[LayerSite]:
    """The groups of units, of every scored site, that are in layers which may lose some.

    Raises
    ------
    ValueError
        If `keep_layers` leaves none.
    """
    depth = len(anatomy.layers)
    first, last = keep_layers = check_keep_layers(keep_layers)
    if first + last >= depth:
        raise ValueError(f"keep_layers={keep_layers} leaves nothing of {depth} layers")
    return [
        LayerSite(site, layer, depth, layers[layer], anatomy.unit_parameters(site, layer))
        for site, layers in scores.items()
        for layer in range(first, depth - last)
    ]


def check_keep_layers(keep_layers: tuple[int, int]) -> tuple[int, int]:
    """How many layers stay whole at either end, checked."""
    ends = ListOf(Integer(0))("keep_layers", keep_layers)
    if len(ends) != 2:
        raise invalid("keep_layers", keep_layers, "how many at either end, as in (1, 1)")
    return ends


def unit_steps(groups: Sequence[LayerSite], multiple_of: int | Mapping[str, int]) -> list[int]:
    """For each group, what the number of staying units must be a multiple of."""
    per_site = multiple_of if isinstance(multiple_of, Mapping) else {"ffn": multiple_of}
    for name in per_site:
        if name not in ALL_SITES:
            raise ValueError(f"multiple_of has {name!r}; {suggest(str(name), list(ALL_SITES))}")
    per_site = {site: Integer(1)("multiple_of", step) for site, step in per_site.items()}
    steps = [per_site.get(group.site, 1) for group in groups]
    for group, step in zip(groups, steps, strict=True):
        if len(group) % step:
            raise ValueError(
                f"multiple_of is {step!r}, which does not divide the {len(group)} {group.site} "
                f"units of layer {group.layer}; choose one of its divisors"
            )
    return steps


def _whole_units(
    groups: Sequence[LayerSite], gone: Sequence[float], steps: Sequence[int]
) -> list[int]:
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
    model: PreTrainedModel, groups: Sequence[LayerSite], counts: Sequence[int]
) -> dict[str, float]:
    """Shares that leave under the three meanings of a ratio."""
    gone = sum(n * group.cost for n, group in zip(counts, groups, strict=True))
    return {name: round(gone / base, 6) for name, base in _bases(model, groups).items()}
