"""Scores: the importance of every unit under one criterion, and the registry of criteria."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from transformers import PreTrainedModel

from ..assets import nearest
from ..families import ALL_SITES, ATTENTION_UNITS, SITES, Anatomy
from ..runtime import fingerprint
from ..statistics import Statistics


@dataclass(frozen=True)
class Scores:
    """Importance of every unit; the lowest leave first.

    Parameters
    ----------
    criterion : str
        Name in `CRITERIA`.
    values : dict
        Site to one array ``[unit]`` per layer.
    model_hash : str
        `fingerprint` of the model that was scored.
    options : dict
        Arguments that the criterion was given.
    """

    criterion: str
    values: dict[str, list[np.ndarray]]
    model_hash: str
    options: dict = field(default_factory=dict)

    def frame(self) -> pd.DataFrame:
        """Tidy table with columns ``site, layer, unit, score``."""
        parts = [
            pd.DataFrame({"site": site, "layer": i, "unit": np.arange(len(layer)), "score": layer})
            for site, layers in self.values.items()
            for i, layer in enumerate(layers)
        ]
        return pd.concat(parts, ignore_index=True)

    def highest_cut(self, keep: dict[str, list[list[int]]], site: str = "ffn") -> float:
        """The highest score among the units that leave: for a global cut, its threshold ε."""
        layers = zip(self.values[site], keep[site], strict=True)
        return float(max(np.delete(values, units).max(initial=0) for values, units in layers))


#: Criteria by name. Each is ``(model, batches, statistics=None, *, sites, **options)`` and returns
#: site to one array ``[unit]`` per layer.
CRITERIA: dict[str, Callable[..., dict[str, list[np.ndarray]]]] = {}


def criterion(name: str) -> Callable:
    """Register a function as a criterion under `name` (decorator)."""

    def register(function: Callable) -> Callable:
        CRITERIA[name] = function
        return function

    return register


def score(
    name: str,
    model: PreTrainedModel,
    batches: Iterable[dict] | None = None,
    statistics: Statistics | None = None,
    sites: tuple[str, ...] = SITES,
    units: str = "kv_group",
    **options,
) -> Scores:
    """Score every unit of a model under one criterion.

    Parameters
    ----------
    name : str
        A key of `CRITERIA`.
    model : transformers.PreTrainedModel
        A supported causal language model; left as it was.
    batches : iterable of dict, optional
        Calibration tokens, for criteria that look at activations.
    statistics : Statistics, optional
        Saved statistics of this model to use instead of a pass over `batches`.
    sites : tuple of str
        Which of ``"ffn"`` and ``"attention"`` to score.
    units : {"kv_group", "balanced_heads"}
        What leaves attention: whole key/value groups (heads, where every head has its own), or one
        query head of every group, keys and values staying. Scores and plans then name the site
        ``"balanced_heads"`` instead of ``"attention"``.
    **options
        The criterion's own options.

    Returns
    -------
    Scores

    Raises
    ------
    ValueError
        If the criterion, a site or a kind of units is unknown, the model has but one query head
        per group to remove in balance, a criterion lacks its data, or a score is not finite.
    """
    if name not in CRITERIA:
        raise ValueError(f"unknown criterion {name!r}; {nearest(name, sorted(CRITERIA))}")
    for site in sites:
        if site not in ALL_SITES:
            raise ValueError(f"unknown site {site!r}; {nearest(site, list(ALL_SITES))}")
    if units not in ATTENTION_UNITS:
        raise ValueError(f"unknown units {units!r}; {nearest(units, list(ATTENTION_UNITS))}")
    sites = tuple(ATTENTION_UNITS[units] if site == "attention" else site for site in sites)
    if units == "balanced_heads" and max(Anatomy(model).units("balanced_heads")) == 1:
        raise ValueError(
            "units='balanced_heads', but this model has one query head per key/value group and "
            "cannot spare it; expected grouped-query attention: use units='kv_group'"
        )
    if statistics is not None:
        statistics.require(model)
    values = CRITERIA[name](model, batches, statistics, sites=sites, **options)
    for site, layers in values.items():
        for layer, found in enumerate(layers):
            if not np.isfinite(found).all():
                raise ValueError(f"{name} gives NaN or infinite {site} scores in layer {layer}")
    return Scores(name, values, fingerprint(model), options)
