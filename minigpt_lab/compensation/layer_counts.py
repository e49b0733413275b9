"""Numbers of units to remove from every layer: their layout, their checks, a search's result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from transformers import PreTrainedModel

from ..models import Anatomy, PruningPlan
from ..planning import LayerSite, prunable_sites


def unscored_sites(
    anatomy: Anatomy, sites: Sequence[str], keep_layers: tuple[int, int]
) -> list[LayerSite]:
    """A `LayerSite` for every site of every layer that may be pruned; their scores are zeros."""
    no_scores = {site: [np.zeros(n) for n in anatomy.units(site)] for site in sites}
    return prunable_sites(anatomy, no_scores, keep_layers)


def by_layer(
    layer_sites: Sequence[LayerSite], numbers: Sequence[int], totals: Mapping[str, Sequence[int]]
) -> dict[str, list[int]]:
    """Regroup one number per layer site into site to one number per layer; 0 where there is none.

    Parameters
    ----------
    totals : mapping
        Site to the number of units in every layer.
    """
    counts = {site: [0] * len(layers) for site, layers in totals.items()}
    for layer_site, number in zip(layer_sites, numbers, strict=True):
        counts[layer_site.site][layer_site.layer] = number
    return counts


def require_counts(
    model: PreTrainedModel,
    counts: Mapping[str, Sequence[int]],
    totals: Mapping[str, Sequence[int]],
    layer_sites: Sequence[LayerSite],
) -> None:
    """Refuse counts that do not cover all layers, or remove more units than a layer has.

    Raises
    ------
    ValueError
        If they do not fit the model, or drop every block of it.
    """
    shape = {site: len(layers) for site, layers in counts.items()}
    expected = {site: len(layers) for site, layers in totals.items()}
    if shape != expected:
        raise ValueError(f"counts has {shape} layers; expected {expected}")
    most = by_layer(layer_sites, [*map(len, layer_sites)], totals)
    for site, layers in counts.items():
        for layer, (count, limit) in enumerate(zip(layers, most[site], strict=True)):
            if count > limit:
                raise ValueError(
                    f"counts removes {count} of {totals[site][layer]} {site} units of layer "
                    f"{layer}; expected at most {limit}, and none where keep_layers keeps it"
                )
    keep = {
        site: [[*range(total - n)] for total, n in zip(totals[site], layers, strict=True)]
        for site, layers in counts.items()
    }
    PruningPlan("", {site: [*units] for site, units in totals.items()}, keep).require(model)


class SearchedCounts(dict):
    """Site to the number of units to remove from every layer, as `search_counts` returns it.

    ``lab.slimgpt(model, batches, counts=counts)`` prunes by them.

    Parameters
    ----------
    counts : dict
        Site to the number of units to remove from every layer.
    origin : dict
        Target and settings of the search, and the KL divergence of its starts and of the result.
    history : pandas.DataFrame
        One row per measured budget: ``round``, ``stage`` (an allocation, "start", "step 12"),
        ``kl``, ``removed`` (parameters), ``enough`` (whether these reach the target), and
        ``counts`` (units to remove from each layer site). A budget may remove more FFN channels
        than the target needs: ``kl`` and ``removed`` include these, ``counts`` does not.
    """

    def __init__(
        self, counts: Mapping[str, list[int]], origin: dict[str, Any], history: pd.DataFrame
    ):
        super().__init__(counts)
        self.origin, self.history = origin, history

    def to_frame(self) -> pd.DataFrame:
        """Columns ``layer, site, remove``."""
        wide = pd.DataFrame(dict(self)).rename_axis("layer").reset_index()
        return wide.melt("layer", var_name="site", value_name="remove")

    def __repr__(self) -> str:
        removed = ", ".join(f"{sum(n)} {site} units" for site, n in self.items())
        kl = ", ".join(f"{k} {value:.3g}" for k, value in self.origin["search"]["kl"].items())
        return f"SearchedCounts({removed} to remove; KL divergence: {kl})"

    def _repr_html_(self) -> str:
        return pd.DataFrame(dict(self)).rename_axis("layer").to_html()
