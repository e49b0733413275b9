"""From scores to a plan: how many units of every layer are pruned, and which."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from transformers import PreTrainedModel

from ..checks import Instance, Integer, Model, Number, OneOf, as_json, checked
from ..criteria import Scores
from ..models import SITES, Anatomy, PruningPlan, keep_all, layer_parameters
from .allocations import Allocation, allocation_name, allocation_rule
from .layer_sites import LayerSite, check_keep_layers, prunable_sites, unit_steps

RATIOS = ("units", "decoder", "model")
RATIO = Number(0, below=1) | None
_FEW = 8  # units of a layer: rounding to a whole one is off by up to a sixteenth of them


@checked(
    model=Model(),
    scores=Instance(Scores, "lab.score gives it"),
    ratio=RATIO,
    parameters=Integer() | None,
    threshold=Number() | None,
    ratio_of=OneOf(RATIOS),
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
    """Plan to prune the units with the lowest scores.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        The model that was scored.
    scores : Scores
        From `score`.
    ratio : float, optional
        Share to remove, of what `ratio_of` says.
    parameters : int, optional
        Largest number of stored parameters the model may have; as few as possible are removed.
    threshold : float, optional
        Remove units with a score at or below this. Give exactly one of these three.
    allocation : str, callable or sequence of float
        How it is spread over layers: a key of `ALLOCATIONS`, a function from a ratio and a list of
        `LayerSite` to one share of units for each, or one share per layer, scaled to the ratio.
    ratio_of : {"units", "decoder", "model"}
        Base of `ratio`: the scored units of the layers that may be pruned (counted in their
        parameters), the decoder layers' parameters, or all of the model's.
    keep_layers : (int, int)
        Numbers of first and last layers to keep whole.
    multiple_of : int or mapping
        Round the FFN channels that are kept (or each site's units) to multiples of this.

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
    target = one_target(ratio=ratio, parameters=parameters, threshold=threshold)
    values = scores.require(model)
    anatomy = Anatomy(model)
    layer_sites = prunable_sites(anatomy, values, keep_layers)
    if threshold is not None:
        removed = np.array([(each.scores <= threshold).sum() for each in layer_sites])
        steps = unit_steps(layer_sites, multiple_of)
        counts = _whole_units(layer_sites, removed, steps).tolist()
    else:
        counts = unit_counts(
            model, layer_sites, ratio, parameters, allocation, ratio_of, multiple_of
        )
    keep = keep_all(anatomy, dict.fromkeys((*SITES, *values)))
    for each, count in zip(layer_sites, counts, strict=True):
        ranked = np.argsort(each.scores, kind="stable")
        keep[each.site][each.layer] = np.sort(ranked[count:]).tolist()
    origin = {
        "method": scores.criterion,
        **as_json(scores.options),
        **target,
        "keep_layers": [*check_keep_layers(keep_layers)],
        "allocation": allocation_name(allocation),
        "ratio_of": ratio_of,
        "removed": removed_shares(model, layer_sites, counts),
    }
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
    given = {name: value for name, value in targets.items() if value is not None}
    if len(given) != 1:
        raise ValueError(f"give exactly one of {', '.join(targets)}; got {given or 'none'}")
    return given


def unit_counts(
    model: PreTrainedModel,
    layer_sites: Sequence[LayerSite],
    ratio: float | None,
    parameters: int | None,
    allocation: str | Allocation | Sequence[float],
    ratio_of: str = "units",
    multiple_of: int | Mapping[str, int] = 1,
    even_out: bool = False,
) -> list[int]:
    """Number of units to remove from each layer site, for a ratio or a size.

    Parameters
    ----------
    layer_sites : sequence of LayerSite
        From `prunable_sites`.
    even_out : bool
        Where a layer has few heads to prune, carry what rounding leaves undone on to the next one,
        so that not all layers lose their first head at one size; and balance the rounding to whole
        heads by pruning more or fewer FFN channels of the layer. A size is always met in this way.

    Other parameters are those of `plan_from_scores`.

    Raises
    ------
    ValueError
        As `plan_from_scores` does.
    """
    rule, steps = allocation_rule(allocation), unit_steps(layer_sites, multiple_of)
    target = parameters_to_remove(model, layer_sites, ratio, parameters, ratio_of)
    to_size = ratio is None or ratio_of != "units"

    def counts_at(share: float) -> np.ndarray:
        removed = rule(share, layer_sites) * np.array([len(each) for each in layer_sites])
        if even_out or to_size:
            return _evened_out(layer_sites, removed, steps)
        return _whole_units(layer_sites, removed, steps)

    if ratio is not None and not to_size:
        if not callable(allocation):
            _check_reached(ratio, rule(ratio, layer_sites), layer_sites)
        counts = counts_at(ratio)
    else:
        stored = model.num_parameters()
        counts = _solve(counts_at, layer_sites, target, stored, exceed=ratio is None)
    if target > 0 and not counts.any():
        warnings.warn(
            f"the target removes no units: {target:,.0f} parameters are less than half a unit of "
            "every layer; increase it or add sites with smaller units (sites=)",
            stacklevel=3,
        )
    return counts.tolist()


def parameters_to_remove(
    model: PreTrainedModel,
    layer_sites: Sequence[LayerSite],
    ratio: float | None,
    parameters: int | None,
    ratio_of: str = "units",
) -> float:
    """Number of parameters to remove, for a ratio or a size: see `plan_from_scores`."""
    bases = _bases(model, layer_sites)
    if ratio is not None:
        return ratio * bases[ratio_of]
    return bases["model"] - (parameters or 0)


def removed_shares(
    model: PreTrainedModel, layer_sites: Sequence[LayerSite], counts: Sequence[int]
) -> dict[str, float]:
    """Shares that are removed under the three meanings of a ratio."""
    removed = _total(layer_sites, counts)
    return {name: round(removed / base, 6) for name, base in _bases(model, layer_sites).items()}


def _bases(model: PreTrainedModel, layer_sites: Sequence[LayerSite]) -> dict[str, int]:
    """Parameters that a ratio can be a share of."""
    return {
        "units": sum(each.parameters for each in layer_sites),
        "decoder": layer_parameters(model),
        "model": model.num_parameters(),
    }


def _total(layer_sites: Sequence[LayerSite], counts: Sequence[int] | np.ndarray) -> int:
    """Parameters of so many units of each layer site."""
    return sum(each.removed(int(n)) for each, n in zip(layer_sites, counts, strict=True))


def _check_reached(ratio: float, shares: Sequence[float], layer_sites: Sequence[LayerSite]) -> None:
    """Refuse shares that fall short of the ratio; warn if equal scores exceed it."""
    sizes = [each.parameters for each in layer_sites]
    tolerance = max(each.cost for each in layer_sites) / sum(sizes)  # one unit
    reached = np.average(shares, weights=sizes)
    if reached < ratio - tolerance:
        raise ValueError(
            f"ratio is {ratio}, but the layers that the allocation gives a share hold only "
            f"{reached:.3g} of the units' parameters; expected at most that"
        )
    if reached > ratio + tolerance:
        warnings.warn(
            f"{reached:.1%} of the units are removed, not {ratio:.1%}: so many share the lowest "
            "scores",
            stacklevel=4,
        )


def _whole_units(
    layer_sites: Sequence[LayerSite], removed: np.ndarray, steps: Sequence[int]
) -> np.ndarray:
    """Numbers of units to remove, rounded: whole, in steps, and never all."""
    totals = np.array([len(each) for each in layer_sites])
    for each, share in zip(layer_sites, removed / totals, strict=True):
        if not -1e-9 <= share <= 1 + 1e-9:
            raise ValueError(
                f"the allocation takes {share:.3g} of layer {each.layer}'s {each.site} units; "
                "expected a share in [0, 1]"
            )
    kept = np.round((totals - removed) / steps).astype(int) * steps
    return totals - np.maximum(kept, steps)


def _evened_out(
    layer_sites: Sequence[LayerSite], removed: np.ndarray, steps: Sequence[int]
) -> np.ndarray:
    """Counts with few heads rounded in turns, and channels that balance it layer by layer."""
    counts = _whole_units(layer_sites, removed, steps)
    layer, cost, total = np.array([(each.layer, each.cost, len(each)) for each in layer_sites]).T
    site = np.array([each.site for each in layer_sites])
    # 1. Heads kept by a layer: the rounded sum up to it, less that up to the layer before.
    for name in {*site} - {"ffn"}:
        few = (site == name) & (total / steps <= _FEW)
        step = np.array(steps)[few]
        whole = np.round(np.cumsum((total - removed)[few] / step) + 1e-9).astype(int)
        kept = np.diff(whole, prepend=0) * step
        counts[few] = total[few] - np.clip(kept, step, total[few])
    # 2. Parameters that whole heads remove too few, by layer, are made up for by its channels.
    is_ffn, most = site == "ffn", total - steps
    missing = np.bincount(layer, np.where(is_ffn, 0, (removed - counts) * cost))
    units = np.where(is_ffn, np.clip(removed + missing[layer] / cost, 0, most), counts)
    # 3. What is more than a layer's channels is spread over those of the others, by their room.
    for _ in layer_sites:
        missing = ((removed - units) * cost).sum()
        room = np.where(is_ffn, most - units if missing > 0 else units, 0) * cost
        if abs(missing) < 1 or not room.any():
            break
        units = units + np.sign(missing) * min(abs(missing) / room.sum(), 1) * room / cost
        units = np.clip(units, 0, most)  # of float64's rounding
    return _whole_units(layer_sites, units, steps)


def _solve(
    counts_at: Callable[[float], np.ndarray],
    layer_sites: Sequence[LayerSite],
    target: float,
    stored: int,
    exceed: bool,
) -> np.ndarray:
    """Counts whose parameters add up to the target, by bisection on the ratio.

    `exceed` asks for at least as many; otherwise the nearer of the two neighbours is taken.
    """
    most = _total(layer_sites, counts_at(1.0))
    if target > most:
        raise ValueError(
            f"the target cannot be met: {target:,.0f} parameters would have to be removed, but "
            f"with one unit left per layer the model still stores {stored - most:,} of {stored:,}, "
            f"{most / stored:.1%} less"
        )
    if target <= _total(layer_sites, counts_at(0.0)):
        return counts_at(0.0)
    low, high = 0.0, 1.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        enough = _total(layer_sites, counts_at(middle)) >= target
        low, high = (low, middle) if enough else (middle, high)
    below, above = counts_at(low), counts_at(high)
    excess, shortfall = _total(layer_sites, above) - target, target - _total(layer_sites, below)
    return above if exceed or excess <= shortfall else below
