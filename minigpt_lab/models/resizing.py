"""Rebuild layers with other numbers of units, and update their attributes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ..architectures import ATTENTION_UNITS
from . import layouts
from .anatomy import Anatomy
from .layers import choose_heads, set_features, set_heads


def set_units(anatomy: Anatomy, keep: Mapping[str, Sequence[Sequence[int]]]) -> None:
    """Rebuild every layer, in place, with only the given units in the given order.

    Parameters
    ----------
    anatomy : Anatomy
        Anatomy of the model.
    keep : mapping
        Site to one list of unit indices per layer. Index -1 stands for a new unit of zeros, which
        changes no output. Without any, a layer's block is dropped; attention of which one site
        keeps none is.
    """
    heads = [layers for site, layers in keep.items() if site in ATTENTION_UNITS.values()]
    dropped = [any(not len(units) for units in each) for each in zip(*heads, strict=True)]
    for site, layers in keep.items():
        for layer, units in enumerate(layers):
            if site != "ffn" and dropped[layer]:
                units = []
            if [*units] != [*range(anatomy.units(site)[layer])]:
                rebuild_layer(anatomy, site, layer, units)


@torch.no_grad()
def rebuild_layer(anatomy: Anatomy, site: str, layer: int, units: Sequence[int]) -> None:
    """`set_units` for one site of one layer."""
    if site == "balanced_heads" and not len(units):  # keys and values that no query reads go too
        site = "attention"
    # 1. The rows and columns of all projections that hold the units.
    axis = anatomy.family.consumes[site].axis
    before = anatomy.grid(site, layer)
    after = layouts.resized(before, axis, len(units))
    for projection, side in anatomy.coupled(site):
        module = anatomy.module(layer, projection)
        old, new = layouts.selected_features(projection, before, units)
        set_features(module, side, old, new, layouts.width(projection, after))
    if site == "ffn":
        return
    # 2. Attention: the numbers of heads that its forward pass reads.
    family = anatomy.family
    set_heads(anatomy.layers[layer], family.attributes, family.consumes["attention"].path, after)
    if site == "attention" and anatomy.family.per_head:
        _set_surviving_heads(anatomy, layer, before[0], units)


def padding(anatomy: Anatomy, site: str, layer: int, total: int) -> list[int]:
    """Unit indices for `set_units` that pad a layer to `total` units with units of zeros.

    New units come last. In a family whose heads differ by their index (ALiBi's slopes,
    `Family.per_head`) they take the indices of removed heads.
    """
    present = anatomy.units(site)[layer]
    if site != "attention" or not anatomy.family.per_head:
        return [*range(present), *[-1] * (total - present)]
    heads = _surviving_heads(anatomy, layer, present)
    padded = sorted([*heads, *_removed_heads(anatomy, heads)[: total - present]])
    return [heads.index(head) if head in heads else -1 for head in padded]


def _set_surviving_heads(anatomy: Anatomy, layer: int, total: int, units: Sequence[int]) -> None:
    """Record which of the dense model's heads a layer has; new ones count as removed heads.

    Parameters
    ----------
    total : int
        Heads of the layer before it was rebuilt with `units`.
    """
    heads = _surviving_heads(anatomy, layer, total)
    free = iter(_removed_heads(anatomy, heads))
    heads = [heads[unit] if unit >= 0 else next(free) for unit in units]
    is_dense = heads == [*range(anatomy.model.config.num_attention_heads)]
    choose_heads(anatomy.layers[layer], anatomy.family.per_head, None if is_dense else heads)


def _surviving_heads(anatomy: Anatomy, layer: int, total: int) -> list[int]:
    """Indices in the dense model of a layer's heads; all `total` if none were recorded."""
    known = getattr(anatomy.layers[layer], "surviving_heads", None)
    return [*range(total)] if known is None else known.tolist()


def _removed_heads(anatomy: Anatomy, heads: Sequence[int]) -> list[int]:
    """Indices in the dense model of the heads that are not among `heads`."""
    return sorted({*range(anatomy.model.config.num_attention_heads)} - {*heads})
