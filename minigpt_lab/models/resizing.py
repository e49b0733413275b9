"""Rebuild layers with other numbers of units; update their attributes and the config."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping, Sequence

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PretrainedConfig
from transformers.initialization import no_init_weights

from . import layouts
from .anatomy import Anatomy
from .architectures import SITES
from .layers import select_heads, set_attribute, set_features


def set_units(anatomy: Anatomy, keep: Mapping[str, Sequence[Sequence[int]]]) -> None:
    """Rebuild every layer, in place, with only the given units in the given order.

    Parameters
    ----------
    anatomy : Anatomy
        Anatomy of the model.
    keep : mapping
        Site to one list of unit indices per layer. Index -1 stands for a new unit of zeros, which
        changes no output.
    """
    for site, layers in keep.items():
        for layer, units in enumerate(layers):
            if [*units] != [*range(anatomy.units(site)[layer])]:
                rebuild_layer(anatomy, site, layer, units)


@torch.no_grad()
def rebuild_layer(anatomy: Anatomy, site: str, layer: int, units: Sequence[int]) -> None:
    """`set_units` for one site of one layer."""
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
    module.surviving_heads = None if is_dense else torch.tensor(heads, device=device)


def _surviving_heads(anatomy: Anatomy, layer: int, total: int) -> list[int]:
    """Indices in the dense model of a layer's heads; all `total` if none were recorded."""
    known = getattr(anatomy.layers[layer], "surviving_heads", None)
    return [*range(total)] if known is None else known.tolist()


def _removed_heads(anatomy: Anatomy, heads: Sequence[int]) -> list[int]:
    """Indices in the dense model of the heads that are not among `heads`."""
    return sorted({*range(anatomy.model.config.num_attention_heads)} - {*heads})


def update_config(anatomy: Anatomy) -> None:
    """Write the layers' widths into the config if all layers agree and it has fields for them."""
    layers = range(len(anatomy.layers))
    _set_fields(anatomy, [{"channel": width} for width in anatomy.units("ffn")])
    grids = [anatomy.grid("attention", layer) for layer in layers]
    _set_fields(anatomy, [{"query": groups * heads, "key": groups} for groups, heads, _ in grids])


def _set_fields(anatomy: Anatomy, counts: Sequence[Mapping[str, int]]) -> None:
    """Set config fields to the numbers of units of some kinds, if these agree in all layers."""
    names = anatomy.family.config
    fields = {names[kind]: count for kind, count in counts[0].items() if kind in names}
    if "query" in counts[0] and fields:
        fields["head_dim"] = anatomy.head_dim
    if all(count == counts[0] for count in counts) and _fits_config(anatomy, fields):
        for name, value in fields.items():
            setattr(anatomy.model.config, name, value)


def _fits_config(anatomy: Anatomy, fields: Mapping[str, int]) -> bool:
    """Whether the config can take these values, and describes the model's other weights too.

    It may not: Llama's config requires hidden size % heads == 0; Phi sizes the norms of a head by
    hidden size / heads.
    """
    config = anatomy.model.config
    try:
        plain = _from_config(anatomy, type(config).from_dict({**config.to_dict(), **fields}))
    except (ValueError, StrictDataclassError):
        return False
    coupled = {
        id(anatomy.module(0, projection).weight)
        for site in SITES
        for projection, _ in anatomy.coupled(site)
    }
    described = dict(plain.layers[0].named_parameters())
    return all(
        weight.shape == described[name].shape
        for name, weight in anatomy.layers[0].named_parameters()
        if name in described and name.endswith("weight") and id(weight) not in coupled
    )


def _from_config(anatomy: Anatomy, config: PretrainedConfig) -> Anatomy:
    """Anatomy of the model that plain transformers builds from a config, on the meta device."""
    with torch.device("meta"), no_init_weights():
        return Anatomy(type(anatomy.model)(copy.deepcopy(config)))


def config_widths(anatomy: Anatomy) -> dict[str, list[int]]:
    """`Anatomy.layer_widths` of the model that plain transformers builds from the config."""
    return _from_config(anatomy, anatomy.model.config).layer_widths()
