"""Rebuilding layers with other numbers of units, and telling layer and config about it."""

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
        Of the model.
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
    axis = anatomy.family.consumes[site].axis
    before = anatomy.grid(site, layer)
    after = layouts.resized(before, axis, len(units))
    for projection, side in anatomy.coupled(site):
        module = anatomy.module(layer, projection)
        old, new = layouts.selected_features(projection, before, units)
        set_features(module, side, old, new, layouts.width(projection, after))
    if site == "ffn":
        return
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
    """Units for `set_units` that pad a layer with zeros to `total`.

    They come last, or in a family whose heads are told apart by their place (`Family.per_head`)
    where the dense model had them.
    """
    present = anatomy.units(site)[layer]
    if site != "attention" or not anatomy.family.per_head:
        return [*range(present), *[-1] * (total - present)]
    heads = _surviving_heads(anatomy, layer, present)
    padded = sorted([*heads, *_removed_heads(anatomy, heads)[: total - present]])
    return [heads.index(head) if head in heads else -1 for head in padded]


def _set_surviving_heads(anatomy: Anatomy, layer: int, total: int, units: Sequence[int]) -> None:
    """Note which of the dense model's heads a layer has now; new ones take free places."""
    module, heads = anatomy.layers[layer], _surviving_heads(anatomy, layer, total)
    free = iter(_removed_heads(anatomy, heads))
    heads = [heads[unit] if unit >= 0 else next(free) for unit in units]
    if not hasattr(module, "surviving_heads"):
        module.register_buffer("surviving_heads", None)
        hook = functools.partial(select_heads, anatomy.family.per_head)
        module.register_forward_pre_hook(hook, with_kwargs=True)
    all_there = heads == [*range(anatomy.model.config.num_attention_heads)]
    device = next(module.parameters()).device
    module.surviving_heads = None if all_there else torch.tensor(heads, device=device)


def _surviving_heads(anatomy: Anatomy, layer: int, total: int) -> list[int]:
    """Indices, in the dense model, of the heads that a layer has."""
    known = getattr(anatomy.layers[layer], "surviving_heads", None)
    return [*range(total)] if known is None else known.tolist()


def _removed_heads(anatomy: Anatomy, heads: Sequence[int]) -> list[int]:
    return sorted({*range(anatomy.model.config.num_attention_heads)} - {*heads})


def update_config(anatomy: Anatomy) -> None:
    """Write the layers' widths into the config, where they agree and it can hold them."""
    layers = range(len(anatomy.layers))
    _set_fields(anatomy, [{"channel": width} for width in anatomy.units("ffn")])
    grids = [anatomy.grid("attention", layer) for layer in layers]
    _set_fields(anatomy, [{"query": groups * heads, "key": groups} for groups, heads, _ in grids])


def _set_fields(anatomy: Anatomy, counts: Sequence[Mapping[str, int]]) -> None:
    """Set the config fields of some kinds of units, given their numbers in every layer."""
    names = anatomy.family.config
    fields = {names[kind]: count for kind, count in counts[0].items() if kind in names}
    if "query" in counts[0] and fields:
        fields["head_dim"] = anatomy.head_dim
    if all(count == counts[0] for count in counts) and _fits_config(anatomy, fields):
        for name, value in fields.items():
            setattr(anatomy.model.config, name, value)


def _fits_config(anatomy: Anatomy, fields: Mapping[str, int]) -> bool:
    """Whether the config can take these values, and describes the model's other weights too.

    Llama's wants hidden size % heads == 0; Phi's normalises as many features of a head as
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
    """What plain transformers builds from a config, without memory for its weights."""
    with torch.device("meta"), no_init_weights():
        return Anatomy(type(anatomy.model)(copy.deepcopy(config)))


def config_widths(anatomy: Anatomy) -> dict[str, list[int]]:
    """`Anatomy.layer_widths` of what plain transformers builds from the config."""
    return _from_config(anatomy, anatomy.model.config).layer_widths()
