"""The modelling file that a folder may carry, for those who load it without this package.

It holds the functions of `layers` that build a pruned model, the family's parts as plain data, and
two classes like those of `auto_classes`; nothing in it is written a second time.
"""

from __future__ import annotations

import inspect
import pprint

from transformers import PretrainedConfig, PreTrainedModel

from ..architectures import FAMILIES, SITES, dense_type
from . import layers
from .anatomy import head_features, weight_axis

FILE = "modeling_minigpt.py"

_HEAD = '''\
"""A pruned model whose layers differ in width, for transformers' ``trust_remote_code=True``.

Written by minigpt_lab for {model_type!r}. With that package, ``import minigpt_lab`` does the same
and this file is not read.
"""

from __future__ import annotations

import inspect
from functools import partial

import numpy as np
import torch
from torch import nn
from transformers import PretrainedConfig, {config}, {model}
from transformers.pytorch_utils import Conv1D

PARTS = {parts}
'''

_CLASSES = """\
class Minigpt{config}({config}):
    model_type = "minigpt-{model_type}"


class Minigpt{model}({model}):
    config_class = Minigpt{config}

    def __init__(self, config, *args, **options):
        super().__init__(config, *args, **options)
        set_widths(self, PARTS, config.minigpt_lab_widths)
        for name in config.minigpt_lab_biases:
            add_bias(self.get_submodule(name))
"""

_FUNCTIONS = (
    weight_axis,
    head_features,
    layers.LayerConfig,
    layers.set_attribute,
    layers.select_heads,
    layers.choose_heads,
    layers.set_widths,
    layers.set_heads,
    layers.set_features,
    layers._moved,
    layers.set_forward,
    layers._constant,
    layers.without_heads,
    layers.add_bias,
)


def family_parts(model_type: str) -> dict:
    """What `set_widths` must know of a family, as plain data."""
    family = FAMILIES[dense_type(model_type)]
    writers = [projection for site in SITES for projection in family.produces[site]]
    readers = [family.consumes[site] for site in SITES]
    return {
        "layers": family.layers,
        "outputs": {projection.path: projection.blocks for projection in writers},
        "inputs": {projection.path: projection.blocks for projection in readers},
        "reader": family.consumes["attention"].path,
        "attributes": family.attributes,
        "per_head": family.per_head,
    }


def modelling_code(
    model_type: str, config: type[PretrainedConfig], model: type[PreTrainedModel]
) -> str:
    """Text of the file for a family.

    Parameters
    ----------
    model_type : str
        Of the dense model.
    config, model : type
        Classes of the dense model.
    """
    names = {"model_type": model_type, "config": config.__name__, "model": model.__name__}
    parts = pprint.pformat(family_parts(model_type), width=100, sort_dicts=False)
    functions = [inspect.getsource(each) for each in _FUNCTIONS]
    return "\n\n".join([_HEAD.format(**names, parts=parts), *functions, _CLASSES.format(**names)])


def auto_map(config: type[PretrainedConfig], model: type[PreTrainedModel]) -> dict[str, str]:
    """The entry of ``config.json`` that names the file's classes, from those of the dense model."""
    module = FILE.removesuffix(".py")
    return {
        "AutoConfig": f"{module}.Minigpt{config.__name__}",
        "AutoModelForCausalLM": f"{module}.Minigpt{model.__name__}",
    }
