"""Classes of pruned models that transformers' Auto classes load, and the config that describes one.

Plain transformers gives every layer the width that the config says. A model whose layers differ is
of a class of its own, a subclass of its architecture's (``MinigptLlamaForCausalLM``): its config
lists the units of every layer, and ``__init__`` resizes the layers to them. So `from_pretrained`,
`save_pretrained`, `generate`, ``Trainer`` and peft see an ordinary model.
"""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Mapping, Sequence

import torch
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from ..architectures import ALL_SITES, FAMILIES, SITES, dense_type, pruned_type
from ..checks import DictOf, Integer, InvalidArgument, ListOf, OneOf, Text
from .anatomy import Anatomy
from .layers import add_bias, set_widths
from .remote_code import family_parts

Classes = tuple[type[PretrainedConfig], type[PreTrainedModel]]
# Of today's largest models a layer has fewer than 2**17 units.
_WIDTHS = DictOf(OneOf(ALL_SITES), ListOf(Integer(0, 2**20), kind=list))
_NAMES = ListOf(Text(), kind=list)
_making = threading.RLock()


def dense_classes(model_type: str) -> Classes:
    """Config and model class of transformers for a dense or pruned model of a family."""
    config = CONFIG_MAPPING[dense_type(model_type)]
    return config, MODEL_FOR_CAUSAL_LM_MAPPING[config]


def pruned_classes(model_type: str) -> Classes:
    """Config and model class for a family's models whose layers differ; registered on first use."""
    with _making:  # one pair for all threads
        return _pruned_classes(dense_type(model_type))


@functools.cache
def _pruned_classes(model_type: str) -> Classes:
    dense_config, dense_model = dense_classes(model_type)

    def __init__(self, config, *args, **options):
        dense_model.__init__(self, config, *args, **options)
        _resize_to_config(self)

    def subclass(base: type, **attributes) -> type:
        return type(f"Minigpt{base.__name__}", (base,), {"__module__": __name__, **attributes})

    config = strict(subclass(dense_config, model_type=pruned_type(model_type)))
    model = subclass(dense_model, config_class=config, __init__=__init__)
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModelForCausalLM.register(config, model, exist_ok=True)
    return config, model


def __getattr__(name: str) -> type:
    """Find a class by its name, as pickle does."""
    for model_type in FAMILIES if name.startswith("Minigpt") else ():
        for each in pruned_classes(model_type):
            if each.__name__ == name:
                return each
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _resize_to_config(model: PreTrainedModel) -> None:
    """Give the layers of a new model the widths, and the added biases, that its config lists.

    Raises
    ------
    InvalidArgument
        If they do not fit the architecture.
    """
    anatomy = Anatomy(model)
    widths = getattr(model.config, "minigpt_lab_widths", None)
    widths = checked_widths(widths, anatomy.layer_widths())
    set_widths(model, family_parts(model.config.model_type), widths)
    vars(model.config).pop("auto_map", None)  # of a folder with `remote_code`; these classes do
    linears = {name: module for _, name, module in anatomy.linears() if module.bias is None}
    names = getattr(model.config, "minigpt_lab_biases", [])
    for name in _NAMES("minigpt_lab_biases", names):
        if name not in linears:
            raise InvalidArgument(
                f"minigpt_lab_biases names {name!r}; expected linear layers whose architecture has "
                "no bias; use the config.json that was saved with these weights"
            )
        add_bias(linears.pop(name))


def checked_widths(widths: object, dense: Mapping[str, list[int]]) -> dict[str, list[int]]:
    """Check the units per layer that a file lists against those of the dense model.

    Raises
    ------
    InvalidArgument
        If they are none, of other layers, or more than the dense model's.
    """
    dense = _WIDTHS("config.json: units per layer", dense)
    units = _WIDTHS("minigpt_lab_widths", widths)
    for site, counts in dense.items():
        found = units.get(site, [])
        if len(found) != len(counts) or any(n > m for n, m in zip(found, counts, strict=True)):
            raise InvalidArgument(
                f"minigpt_lab_widths of {site} are {found[:3]}… for {len(found)} layers; expected "
                f"at most {counts[:3]}… for {len(counts)}, the widths by the rest of the config; "
                "use the config.json that was saved with these weights"
            )
    return units


def update_config(anatomy: Anatomy) -> None:
    """Give a model the config, and the class, from which its layers can be built again.

    Where all layers agree and the config has a field for their width, that is set, and the model is
    of its architecture's own class; otherwise it becomes one of `pruned_classes`.
    """
    # 1. Widths that plain transformers has fields for.
    layers = range(len(anatomy.layers))
    _set_fields(anatomy, [{"channel": width} for width in anatomy.units("ffn")])
    grids = [anatomy.grid("attention", layer) for layer in layers]
    _set_fields(anatomy, [{"query": groups * heads, "key": groups} for groups, heads, _ in grids])
    # 2. All widths, and biases that the architecture lacks, if that does not say everything.
    update_class(anatomy)


def update_class(anatomy: Anatomy) -> None:
    """`update_config`, but for the fields of transformers' own config."""
    model, config = anatomy.model, anatomy.model.config
    dense, pruned = dense_classes(config.model_type), pruned_classes(config.model_type)
    widths = anatomy.layer_widths()
    biases = [name for _, name, module in anatomy.linears() if hasattr(module, "added_bias")]
    is_plain = not biases and config_widths(anatomy) == widths
    for name, value in (("minigpt_lab_widths", widths), ("minigpt_lab_biases", biases)):
        vars(config).pop(name, None)
        if not is_plain:
            setattr(config, name, value)
    config.__class__ = dense[0] if is_plain else pruned[0]
    if "model_type" in vars(config):  # a config that was read from a file
        config.model_type = type(config).model_type
    if type(model) in (dense[1], pruned[1]):  # a user's subclass stays what it is
        model.__class__ = dense[1] if is_plain else pruned[1]


def _set_fields(anatomy: Anatomy, counts: Sequence[Mapping[str, int]]) -> None:
    """Set config fields to the numbers of units of some kinds, if these agree in all layers."""
    names = anatomy.family.config
    fields = {names[kind]: count for kind, count in counts[0].items() if kind in names}
    if "query" in counts[0] and fields:
        fields["head_dim"] = anatomy.head_dim
    # plain transformers runs no attention without heads, and no Conv1D without inputs
    alike = all(count == counts[0] for count in counts) and all(fields.values())
    if alike and _fits_config(anatomy, fields):
        for name, value in fields.items():
            setattr(anatomy.model.config, name, value)


def _fits_config(anatomy: Anatomy, fields: Mapping[str, int]) -> bool:
    """Whether the config can take these values, and describes the model's other weights too.

    It may not: Llama's config requires hidden size % heads == 0; Phi sizes the norms of a head by
    hidden size / heads.
    """
    config = anatomy.model.config
    dense_config, _ = dense_classes(config.model_type)
    try:
        plain = _from_config(anatomy, dense_config.from_dict({**config.to_dict(), **fields}))
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
    _, dense_model = dense_classes(anatomy.model.config.model_type)
    with torch.device("meta"), no_init_weights():
        return Anatomy(dense_model(copy.deepcopy(config)))


def config_widths(anatomy: Anatomy) -> dict[str, list[int]]:
    """`Anatomy.layer_widths` of the model that plain transformers builds from the config."""
    return _from_config(anatomy, anatomy.model.config).layer_widths()
