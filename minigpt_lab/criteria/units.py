"""What criteria share: their data, their options, and how a unit's weights become one score."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator

import numpy as np
import torch
from torch import nn

from ..calibration import Statistics, collect_statistics
from ..checks import InvalidArgument, OneOf, invalid, suggest
from ..models import ALL_SITES, ATTENTION_UNITS, Anatomy, Projection, weight_axis

#: How the scores ``[structure, …]`` of a unit's coupled structures become one. ``"last"`` is the
#: projection that reads the units (LLM-Pruner's "last only").
REDUCTIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "sum": lambda scores: scores.sum(0),
    "mean": lambda scores: scores.mean(0),
    "max": lambda scores: scores.max(0),
    "prod": lambda scores: scores.prod(0),
    "last": lambda scores: scores[-1],
}
SCOPES = ("coupled", "consumer")


def check_option(name: str, value: object, known: Collection[str]) -> None:
    """Refuse a value that an option does not have."""
    if not isinstance(value, str):
        OneOf(known)(name, value)
    if value not in known:
        raise InvalidArgument(f"unknown {name} {value!r:.60}; {suggest(value, list(known))}")


def attention_site(model, units: str) -> str:
    """The site whose units are ``"kv_group"`` or ``"balanced_heads"``, if the model can spare one.

    Raises
    ------
    ValueError
        If there are no such units, or the model has but one query head per key/value group to
        remove in balance.
    """
    check_option("units", units, ATTENTION_UNITS)
    if units == "balanced_heads" and max(Anatomy(model).units("balanced_heads")) == 1:
        raise ValueError(
            "units='balanced_heads', but this model has one query head per key/value group and "
            "cannot spare it; expected grouped-query attention: use units='kv_group'"
        )
    return ATTENTION_UNITS[units]


def chosen_sites(model, sites: Iterable[str], units: str) -> tuple[str, ...]:
    """Sites as asked for, ``"attention"`` being the one of the units that it is to lose.

    Raises
    ------
    ValueError
        If there is no such site or no such units.
    """
    attention = attention_site(model, units)
    if isinstance(sites, str) or not np.iterable(sites) or not (sites := tuple(sites)):
        raise invalid("sites", sites, "one or more of them, as in ('ffn',)")
    for site in sites:
        check_option("site", site, ALL_SITES)
    return tuple(dict.fromkeys(attention if site == "attention" else str(site) for site in sites))


def known_statistics(model, batches, statistics: Statistics | None, name: str) -> Statistics:
    """The statistics given, or those of a pass over the batches."""
    if statistics is not None:
        return statistics
    if batches is None:
        raise ValueError(f"the {name} criterion needs batches or statistics")
    return collect_statistics(model, batches)


def input_norms(statistics: Statistics, name: str) -> np.ndarray:
    """``‖X_j‖₂`` over all tokens, of every input feature of a linear layer."""
    return np.sqrt(statistics.mean(name, "input", "square") * statistics.n_tokens)


def by_input(vector: np.ndarray | torch.Tensor, module: nn.Module) -> torch.Tensor:
    """One number per input feature, shaped to multiply the layer's weight, in float32."""
    vector = torch.as_tensor(vector, dtype=torch.float32, device=module.weight.device)
    return vector.unsqueeze(1 - weight_axis(module, "input"))


def per_feature(weights: torch.Tensor, module: nn.Module, side: str) -> torch.Tensor:
    """Sum of numbers shaped like the layer's weight over each feature's row or column."""
    return weights.sum(1 - weight_axis(module, side))


@torch.no_grad()
def unit_scores(
    model,
    sites: tuple[str, ...],
    feature_scores: Callable[[str, nn.Module, str], torch.Tensor],
    scope: str = "coupled",
    reduce: str = "sum",
    by_channel: bool = False,
) -> dict[str, list[np.ndarray]]:
    """Scores of units from scores of features, layer by layer.

    A structure is the part of one projection that belongs to a unit; a fused projection is as many
    structures as it has blocks, so that it counts like separate ones.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        What is scored.
    sites : tuple of str
        ``"ffn"``, ``"attention"``.
    feature_scores : callable
        ``(name, module, side)`` of a linear layer to one score ``[feature]`` per ``"input"`` or
        ``"output"`` feature; a structure's score is the sum over its features.
    scope : {"coupled", "consumer"}
        All structures of a unit, or just the columns of the projection that reads it (o/down).
    reduce : str
        Key of `REDUCTIONS`: how the structures' scores become one.
    by_channel : bool
        Reduce channel by channel, and sum a head's channels afterwards. Where a group's structures
        differ in width (grouped queries), query heads are added up to the width of one key.
    """
    check_option("scope", scope, SCOPES)
    check_option("reduce", reduce, REDUCTIONS)
    anatomy = Anatomy(model)
    found: dict[str, list[np.ndarray]] = {site: [] for site in sites}
    for layer in range(len(anatomy.layers)):
        for site in sites:
            structures = []
            for projection, side in _projections(anatomy, site, scope):
                name, module = anatomy.name(layer, projection), anatomy.module(layer, projection)
                scores = feature_scores(name, module, side).detach().cpu().double().numpy()
                for block in projection.unit_blocks:
                    features = anatomy.unit_features(projection, layer, block=block)
                    structures.append(scores[features])  # [unit, feature]
            width = min(each.shape[1] for each in structures) if by_channel else 1
            channels = [each.reshape(len(each), -1, width).sum(1) for each in structures]
            found[site].append(REDUCTIONS[reduce](np.stack(channels)).sum(1))
    return found


def _projections(anatomy: Anatomy, site: str, scope: str) -> Iterator[tuple[Projection, str]]:
    if scope == "coupled":
        return anatomy.coupled(site)
    return iter([(anatomy.family.consumes[site], "input")])


def scored_layers(model, sites: tuple[str, ...], scope: str = "coupled") -> dict[str, int]:
    """Name to layer index of every linear layer that `unit_scores` asks for, in its order."""
    anatomy = Anatomy(model)
    return {
        anatomy.name(layer, projection): layer
        for layer in range(len(anatomy.layers))
        for site in sites
        for projection, _ in _projections(anatomy, site, scope)
    }
