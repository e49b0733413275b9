"""Helpers of the criteria: sites, statistics, shared options, feature scores to unit scores."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch

from ..calibration import Statistics, collect_statistics
from ..checks import ListOf, OneOf, checked
from ..models import ALL_SITES, ATTENTION_UNITS, Anatomy, Projection, weight_axis

#: Reductions of a unit's scores ``[structure, …]`` over its coupled structures. ``"last"`` takes
#: the projection that reads the units (LLM-Pruner's "last only").
REDUCTIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "sum": lambda scores: scores.sum(0),
    "mean": lambda scores: scores.mean(0),
    "max": lambda scores: scores.max(0),
    "prod": lambda scores: scores.prod(0),
    "last": lambda scores: scores[-1],
}
#: Checks of the options that criteria share.
REDUCE = OneOf(REDUCTIONS)
SCOPE = OneOf(("coupled", "consumer"))


@checked(units=OneOf(ATTENTION_UNITS))
def attention_site(model, units: str) -> str:
    """Site name of attention's units, ``"kv_group"`` or ``"balanced_heads"``.

    Raises
    ------
    ValueError
        If there are no such units, or the model has but one query head per key/value group to
        remove in balance.
    """
    if units == "balanced_heads" and max(Anatomy(model).units("balanced_heads")) == 1:
        raise ValueError(
            "units='balanced_heads', but this model has one query head per key/value group and "
            "cannot spare it; expected grouped-query attention: use units='kv_group'"
        )
    return ATTENTION_UNITS[units]


@checked(sites=ListOf(OneOf(ALL_SITES), 1))
def chosen_sites(model, sites: Iterable[str], units: str) -> tuple[str, ...]:
    """Sites without repeats; ``"attention"`` becomes the site of its chosen units.

    Raises
    ------
    ValueError
        If there is no such site or no such units.
    """
    attention = attention_site(model, units)
    return tuple(dict.fromkeys(attention if site == "attention" else site for site in sites))


def known_statistics(model, batches, statistics: Statistics | None) -> Statistics:
    """Return the given statistics, or collect them in a pass over the batches."""
    if statistics is not None:
        return statistics
    if batches is None:
        raise ValueError("it needs batches or statistics")
    return collect_statistics(model, batches)


def input_norms(statistics: Statistics, name: str) -> np.ndarray:
    """``‖X_j‖₂`` over all tokens for every input feature *j* of a linear layer ``[input]``."""
    return np.sqrt(statistics.mean(name, "input", "square") * statistics.n_tokens)


class ScoredLinear:
    """A linear layer as a criterion sees it, with its weight as ``W [output, input]``.

    Attributes
    ----------
    name, site : str
        Full name, and the site whose units are scored.
    module : torch.nn.Module
        The layer; some families store the weight transposed.
    side : {"input", "output"}
        Whether units are columns of W (``"input"``) or rows (``"output"``).
    """

    def __init__(
        self, anatomy: Anatomy, layer: int, site: str, projection: Projection, side: str = "input"
    ):
        self.name = anatomy.name(layer, projection)
        self.module = anatomy.module(layer, projection)
        self.site, self.side = site, side

    @property
    def W(self) -> torch.Tensor:
        """The weight ``[output, input]`` in float32."""
        return self.oriented(self.module.weight.float())

    def oriented(self, tensor: torch.Tensor) -> torch.Tensor:
        """Bring a tensor shaped like the stored weight (its gradient) to ``[output, input]``."""
        return tensor.movedim(weight_axis(self.module, "output"), 0)

    def row(self, values: np.ndarray | torch.Tensor) -> torch.Tensor:
        """Values ``[input]`` as float32 on the weight's device, to multiply every row of W by."""
        return torch.as_tensor(values, dtype=torch.float32, device=self.module.weight.device)

    def per_feature(self, matrix: torch.Tensor) -> torch.Tensor:
        """Sum a matrix ``[output, input]`` for each feature on the side of the units ``[feature]``.

        These are column sums for ``side="input"``, row sums for ``side="output"``.
        """
        return matrix.sum(0 if self.side == "input" else 1)


@torch.no_grad()
def unit_scores(
    model,
    sites: tuple[str, ...],
    feature_scores: Callable[[ScoredLinear], torch.Tensor | np.ndarray],
    *,
    scope: str = "coupled",
    reduce: str = "sum",
    by_channel: bool = False,
    average: bool = False,
) -> dict[str, list[np.ndarray]]:
    """Scores of units from scores of features, layer by layer.

    A structure is the part of one projection that belongs to a unit; a fused projection is as many
    structures as it has blocks, so that it counts like separate ones.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        The model to score.
    sites : tuple of str
        ``"ffn"``, ``"attention"`` or ``"balanced_heads"``.
    feature_scores : callable
        From a `ScoredLinear` to one score ``[feature]`` for each of its features on the side of the
        units; a structure's score is the sum over its features.
    scope : {"coupled", "consumer"}
        All structures of a unit, or just the columns of the projection that reads it (o/down).
    reduce : str
        Key of `REDUCTIONS`, over the structures of a unit.
    by_channel : bool
        Reduce channel by channel, and sum a head's channels afterwards.
    average : bool
        Average over a unit's features instead of summing.

    Returns
    -------
    dict
        Site to one array ``[unit]`` per layer.
    """
    anatomy = Anatomy(model)
    scores: dict[str, list[np.ndarray]] = {site: [] for site in sites}
    for layer in range(len(anatomy.layers)):
        for site in sites:
            if not anatomy.units(site)[layer]:  # the block was dropped
                scores[site].append(np.zeros(0))
                continue
            structures = []  # [structure]: scores [unit, feature]
            for projection, side in _projections(anatomy, site, scope):
                of_features = feature_scores(ScoredLinear(anatomy, layer, site, projection, side))
                of_features = torch.as_tensor(of_features).detach().cpu().double().numpy()
                for block in projection.unit_blocks:
                    features = anatomy.unit_features(projection, layer, block=block)
                    structures.append(of_features[features])
            values = _reduced(structures, reduce, by_channel)  # [unit]
            scores[site].append(values / structures[0].shape[1] if average else values)
    return scores


def _reduced(structures: list[np.ndarray], reduce: str, by_channel: bool) -> np.ndarray:
    """Reduce the scores ``[unit, feature]`` of all structures to one score per unit ``[unit]``.

    With grouped queries, a unit's queries have more features than its key. Channel by channel, the
    query heads are then added up to one head, so that all structures have a key's width.
    """
    width = min(scores.shape[1] for scores in structures) if by_channel else 1
    # 1. Fold each structure to so many channels.
    channels = [scores.reshape(len(scores), -1, width).sum(1) for scores in structures]
    # 2. Reduce over the structures, then sum over the channels.
    reduced = REDUCTIONS[reduce](np.stack(channels))  # [structure, unit, channel] → [unit, channel]
    return reduced.sum(1)


def _projections(anatomy: Anatomy, site: str, scope: str) -> Iterator[tuple[Projection, str]]:
    """Projections of a scope, each with the side that holds the units' features."""
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
        if anatomy.units(site)[layer]
        for projection, _ in _projections(anatomy, site, scope)
    }
