"""Numbers of units to remove from every layer: their layout, their checks, a search's result."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from ..models import Anatomy
from ..planning import LayerSite, check_keep_layers, prunable_sites


def unscored_sites(
    anatomy: Anatomy, sites: Sequence[str], keep_layers: tuple[int, int]
) -> list[LayerSite]:
    """A `LayerSite` for every site of every layer that may be pruned; their scores are zeros."""
    no_scores = {site: [np.zeros(n) for n in anatomy.units(site)] for site in sites}
    return prunable_sites(anatomy, no_scores, check_keep_layers(keep_layers))


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
    counts: Mapping[str, Sequence[int]],
    totals: Mapping[str, Sequence[int]],
    layer_sites: Sequence[LayerSite],
) -> dict[str, list[int]]:
    """Return the counts as lists if they cover all layers and keep at least one unit of each.

    Raises
    ------
    ValueError
        If they do not fit the model.
    """
    shape = {site: len(layers) for site, layers in counts.items()}
    if shape != {site: len(layers) for site, layers in totals.items()}:
        depth = layer_sites[0].depth
        raise ValueError(f"counts has {shape}; expected {sorted(totals)} with {depth} layers each")
    prunable = {(each.site, each.layer) for each in layer_sites}
    for site, layers in counts.items():
        for layer, (count, total) in enumerate(zip(layers, totals[site], strict=True)):
            if count >= total:
                why = "at least one must be kept"
            elif count and (site, layer) not in prunable:
                why = "keep_layers keeps all of them"
            else:
                continue
            raise ValueError(
                f"counts removes {count} of {total} {site} units of layer {layer}; {why}"
            )
    return {site: [*layers] for site, layers in counts.items()}


@dataclass(frozen=True, eq=False)
class SearchedCounts(Mapping):
    """Units to remove from every layer, as `search_counts` found them.

    A mapping of sites to a number per layer: ``lab.slimgpt(model, batches, counts=counts)``.

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

    counts: dict[str, list[int]]
    origin: dict[str, Any]
    history: pd.DataFrame = field(repr=False)

    def __getitem__(self, site: str) -> list[int]:
        return self.counts[site]

    def __iter__(self) -> Iterator[str]:
        return iter(self.counts)

    def __len__(self) -> int:
        return len(self.counts)

    def to_frame(self) -> pd.DataFrame:
        """Columns ``site, layer, remove``."""
        rows = [
            [site, layer, n]
            for site, layers in self.counts.items()
            for layer, n in enumerate(layers)
        ]
        return pd.DataFrame(rows, columns=["site", "layer", "remove"])

    def __repr__(self) -> str:
        removed = ", ".join(f"{sum(n)} {site} units" for site, n in self.counts.items())
        kl = ", ".join(f"{k} {value:.3g}" for k, value in self.origin["search"]["kl"].items())
        return f"SearchedCounts({removed} to remove; KL divergence: {kl})"

    def _repr_html_(self) -> str:
        return self.to_frame().pivot(index="layer", columns="site", values="remove").to_html()
