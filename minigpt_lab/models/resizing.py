"""Rebuild layers with other numbers of units, and update their attributes."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import torch

from ..architectures import ATTENTION_UNITS
from . import layouts
from .anatomy import Anatomy
from .layers import select_heads, set_attribute, set_features, set_forward, without_heads


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
    groups, heads, head_dim = after
    values = {
        "query": groups * heads,
        "key": groups,
        "per_key": heads,
        "features": groups * heads * head_dim,
    }
    for path, held in anatomy.family.attributes.items():
        set_attribute(anatomy.layers[layer], path, values[held])
    attention = anatomy.attention(layer)
    reader = anatomy.family.consumes["attention"].path.rpartition(".")[2]
    forward = functools.partial(without_heads, attention, reader)
    set_forward(attention, None if values["query"] else forward)
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
    module, heads = anatomy.layers[layer], _surviving_heads(anatomy, layer, total)
    free = iter(_removed_heads(anatomy, heads))
    heads = [heads[unit] if unit >= 0 else next(free) for unit in units]
    if not hasattr(module, "surviving_heads"):
        module.register_buffer("surviving_heads", None)
        hook = functools.partial(select_heads, anatomy.family.per_head)
        module.register_forward_pre_hook(hook, with_kwargs=True)
    is_dense = heads == [*range(anatomy.model.config.num_attention_heads)]
    device = next(module.parameters()).device
    module.surviving_heads = (
        None if is_dense else torch.tensor(heads, dtype=torch.int64, device=device)
    )


def _surviving_heads(anatomy: Anatomy, layer: int, total: int) -> list[int]:
    """Indices in the dense model of a layer's heads; all `total` if none were recorded."""
    known = getattr(anatomy.layers[layer], "surviving_heads", None)
    return [*range(total)] if known is None else known.tolist()


def _removed_heads(anatomy: Anatomy, heads: Sequence[int]) -> list[int]:
    """Indices in the dense model of the heads that are not among `heads`."""
    return sorted({*range(anatomy.model.config.num_attention_heads)} - {*heads})
