"""Shared by the criteria: their data, their options, and the way from weights to units' scores."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from ..calibration import Statistics, collect_statistics
from ..checks import ListOf, OneOf, checked
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
#: Checks of the options that criteria share.
REDUCE = OneOf(REDUCTIONS)
SCOPE = OneOf(("coupled", "consumer"))


@checked(units=OneOf(ATTENTION_UNITS))
def attention_site(model, units: str) -> str:
    """Site of attention's ``"kv_group"`` or ``"balanced_heads"``, if the model can spare one.

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
    """Sites without repeats; ``"attention"`` becomes the site of the units to prune it by.

    Raises
    ------
    ValueError
        If there is no such site or no such units.
    """
    attention = attention_site(model, units)
    return tuple(dict.fromkeys(attention if site == "attention" else site for site in sites))


def known_statistics(model, batches, statistics: Statistics | None) -> Statistics:
    """The statistics given, or those of a pass over the batches."""
    if statistics is not None:
        return statistics
    if batches is None:
        raise ValueError("it needs batches or statistics")
    return collect_statistics(model, batches)


def input_norms(statistics: Statistics, name: str) -> np.ndarray:
    """``‖X_j‖₂`` over all tokens, of every input feature of a linear layer."""
    return np.sqrt(statistics.mean(name, "input", "square") * statistics.n_tokens)


@dataclass(frozen=True)
class ScoredLinear:
    """One linear layer for a criterion, with its weight as ``W [output, input]``.

    Parameters
    ----------
    name : str
        Full name.
    module : torch.nn.Module
        The layer; some families store the weight transposed.
    side : {"input", "output"}
        Whether units are columns of W (``"input"``) or rows.
    """

    name: str
    module: nn.Module
    side: str

    @classmethod
    def of(
        cls, anatomy: Anatomy, layer: int, projection: Projection, side: str = "input"
    ) -> ScoredLinear:
        """A projection of one decoder layer; by default one that reads units."""
        return cls(anatomy.name(layer, projection), anatomy.module(layer, projection), side)

    @property
    def W(self) -> torch.Tensor:
        """The weight in float32."""
        return self.oriented(self.module.weight.float())

    def oriented(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor shaped like the stored weight as ``[output, input]``."""
        return tensor.movedim(weight_axis(self.module, "output"), 0)

    def row(self, values: np.ndarray | torch.Tensor) -> torch.Tensor:
        """One number per input feature, on the weight's device in float32."""
        return torch.as_tensor(values, dtype=torch.float32, device=self.module.weight.device)

    def per_feature(self, matrix: torch.Tensor) -> torch.Tensor:
        """Sums of ``[output, input]`` over each column, or each row, of the side of the units."""
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
        ``"ffn"``, ``"attention"``.
    feature_scores : callable
        From a `ScoredLinear` to one score ``[feature]`` for each of its features on the side of the
        units; a structure's score is the sum over its features.
    scope : {"coupled", "consumer"}
        All structures of a unit, or just the columns of the projection that reads it (o/down).
    reduce : str
        Key of `REDUCTIONS`: how the structures' scores become one.
    by_channel : bool
        Reduce channel by channel, and sum a head's channels afterwards.
    average : bool
        Average over a unit's features instead of summing.
    """
    anatomy = Anatomy(model)
    scores: dict[str, list[np.ndarray]] = {site: [] for site in sites}
    for layer in range(len(anatomy.layers)):
        for site in sites:
            structures = list(_structures(anatomy, layer, site, scope, feature_scores))
            values = _combined(structures, reduce, by_channel)
            scores[site].append(values / structures[0].shape[1] if average else values)
    return scores


def _structures(
    anatomy: Anatomy, layer: int, site: str, scope: str, feature_scores: Callable
) -> Iterator[np.ndarray]:
    """Features' scores ``[unit, feature]`` of every structure of a layer's units."""
    for projection, side in _projections(anatomy, site, scope):
        scores = feature_scores(ScoredLinear.of(anatomy, layer, projection, side))
        scores = torch.as_tensor(scores).detach().cpu().double().numpy()  # [feature]
        for block in projection.unit_blocks:
            yield scores[anatomy.unit_features(projection, layer, block=block)]


def _combined(structures: list[np.ndarray], reduce: str, by_channel: bool) -> np.ndarray:
    """One score per unit ``[unit]`` of the scores ``[unit, feature]`` of its structures.

    Where structures differ in width (grouped queries), query heads are first added up to the width
    of one key.
    """
    width = min(each.shape[1] for each in structures) if by_channel else 1
    channels = [each.reshape(len(each), -1, width).sum(1) for each in structures]
    return REDUCTIONS[reduce](np.stack(channels)).sum(1)  # [structure, unit, channel] → [unit]


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
