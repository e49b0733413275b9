"""The units of one site in one layer, as an allocation sees them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..checks import Integer, ListOf, invalid, suggest
from ..models import ALL_SITES, Anatomy


@dataclass(frozen=True)
class LayerSite:
    """One site of one layer that may be pruned.

    Parameters
    ----------
    site : str
        ``"ffn"`` or ``"attention"``.
    layer, depth : int
        Index of the layer, and the number of layers of the model.
    scores : numpy.ndarray
        Importance ``[unit]``.
    cost : int
        Parameters that are removed with one unit.
    rest : int
        Further ones that are removed with the last unit: keys and values, where queries are the
        units.
    """

    site: str
    layer: int
    depth: int
    scores: np.ndarray
    cost: int
    rest: int = 0

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def parameters(self) -> int:
        """Parameters of all its units, one by one."""
        return len(self) * self.cost

    def removed(self, count: int) -> int:
        """Parameters that are removed with so many units."""
        return count * self.cost + (self.rest if count == len(self) else 0)


def prunable_sites(
    anatomy: Anatomy, scores: Mapping[str, Sequence[np.ndarray]], keep_layers: tuple[int, int]
) -> list[LayerSite]:
    """Every scored site of every layer but the first and last ones that are kept whole.

    Sites without units, of dropped blocks, are left out.

    Raises
    ------
    ValueError
        If `keep_layers` leaves none.
    """
    depth = len(anatomy.layers)
    first, last = keep_layers = check_keep_layers(keep_layers)
    if first + last >= depth:
        raise ValueError(f"keep_layers={keep_layers} leaves nothing of {depth} layers")
    layer_sites, groups = [], anatomy.units("attention")
    for site, layers in scores.items():
        for layer in range(first, depth - last):
            cost, rest = anatomy.unit_parameters(site, layer), 0
            if site == "balanced_heads":  # its groups hold keys and values too
                whole = groups[layer] * anatomy.unit_parameters("attention", layer)
                rest = whole - len(layers[layer]) * cost
            layer_sites.append(LayerSite(site, layer, depth, layers[layer], cost, rest))
    return [each for each in layer_sites if len(each)]


def most_units(layer_sites: Sequence[LayerSite], steps: Sequence[int]) -> list[int]:
    """Numbers of units to remove that leave every layer site the fewest: one step of them."""
    return [len(each) - step for each, step in zip(layer_sites, steps, strict=True)]


def check_keep_layers(keep_layers: tuple[int, int]) -> tuple[int, int]:
    """Numbers of first and last layers to keep whole, checked."""
    ends = ListOf(Integer(0))("keep_layers", keep_layers)
    if len(ends) != 2:
        raise invalid("keep_layers", keep_layers, "how many at either end, as in (1, 1)")
    return ends


def unit_steps(layer_sites: Sequence[LayerSite], multiple_of: int | Mapping[str, int]) -> list[int]:
    """For each layer site, the number that its kept units must be a multiple of."""
    per_site = multiple_of if isinstance(multiple_of, Mapping) else {"ffn": multiple_of}
    for name in per_site:
        if name not in ALL_SITES:
            raise ValueError(f"multiple_of has {name!r}; {suggest(str(name), list(ALL_SITES))}")
    per_site = {site: Integer(1)("multiple_of", step) for site, step in per_site.items()}
    steps = [per_site.get(each.site, 1) for each in layer_sites]
    for each, step in zip(layer_sites, steps, strict=True):
        if len(each) % step:
            raise ValueError(
                f"multiple_of is {step!r}, which does not divide the {len(each)} {each.site} "
                f"units of layer {each.layer}; choose one of its divisors"
            )
    return steps
