"""Write a model as a folder in the form of vLLM's ``DeciLMForCausalLM``, whose layers may differ.

The form is that of NVIDIA's Nemotron-NAS models (Llama-3_1-Nemotron-51B): a Llama, and a list
``block_configs`` with the key/value groups and the FFN width of every layer.
"""

from __future__ import annotations

import copy
import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..architectures import dense_type
from ..checks import Instance, InvalidArgument, Location, Model, Tokenizer, checked, writable_folder
from ..models import Anatomy, dtype_name, model_card, set_units, tokenizer_for
from ..store import atomic_write
from .rounding import refuse_unusable_weights

#: Families that compute what a Llama does, biases aside.
_FAMILIES = ("llama", "mistral", "qwen2")
_ROTATIONS = ("default", "linear", "llama3")
_QKV, _MLP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj", "down_proj")
_CONFIG_FILE, _WEIGHTS = "configuration_decilm.py", "model.safetensors"

#: transformers has no class for this type of config, so that a folder brings its own.
_CONFIG_CLASS = '''\
"""Config of a Nemotron-NAS model, as vLLM reads it. Written by minigpt_lab."""

from transformers import PretrainedConfig


class Fields(dict):
    """A part of the config, whose entries are attributes too."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class DeciLMConfig(PretrainedConfig):
    """A Llama's config, and ``block_configs``, one entry per layer."""

    model_type = "nemotron-nas"

    def __init__(self, block_configs=(), **options):
        super().__init__(**options)
        self.block_configs = [
            Fields({part: Fields(entries) for part, entries in block.items()})
            for block in block_configs
        ]
'''

_LOADING = """## How to load it

With vLLM. The folder was checked field by field against the form that vLLM's `DeciLMForCausalLM`
reads, and **was not run in vLLM here**. `--trust-remote-code` lets vLLM read
`configuration_decilm.py`, which only names the entries of `config.json`:

```
vllm serve path/to/this/folder --trust-remote-code
```
"""


@checked(
    model=Model(),
    tokenizer=Tokenizer(),
    path=Location(),
    card=Instance(ModelCard, "lab.model_card(model) makes one") | None,
)
@torch.no_grad()
def export_vllm(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    path: str | os.PathLike,
    *,
    card: ModelCard | None = None,
) -> Path:
    """Write a model and its tokenizer as a folder that vLLM reads, layers of any FFN width.

    Not run in vLLM here: the folder is checked against the form of ``DeciLMForCausalLM`` in vLLM's
    ``nemotron_nas.py``, as it is in 2026. ``vllm serve FOLDER --trust-remote-code`` loads it.

    For Llama (SmolLM too), Mistral and Qwen2. That form has one number of query heads for all
    layers; a layer has its own FFN width and number of key/value groups (``num_attention_heads /
    n_heads_in_group``), or no FFN or attention (``no_op``; units of zeros where it left a bias, and
    for the first attention, which vLLM cannot do without). Where only some layers have a bias, the
    others get one of zeros. A sliding window ends the context. On several GPUs their number must
    divide the heads, the groups and the FFN widths: prune with ``multiple_of``.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Dense or shrunk.
    tokenizer : transformers.PreTrainedTokenizerBase
        The model's tokenizer; for a model with a trimmed vocabulary the original one may be given.
    path : str or path
        Folder to create; there must be none, or an empty one.
    card : huggingface_hub.ModelCard, optional
        By default that of `model_card` without measured losses; how to load the folder is replaced.

    Returns
    -------
    pathlib.Path
        The folder.

    Raises
    ------
    FileExistsError
        If there is something at `path`.
    ValueError
        If vLLM's graph does not compute what the model does, query heads were removed from some
        layers only, or the model is under a mask or offloaded.
    OSError
        If the disk refuses; no folder is left.
    RuntimeError
        If what was read back differs.
    """
    refuse_unusable_weights(model, "export_vllm")
    _refuse_other_graphs(model)
    text = _without_loading(str(card or model_card(model)))
    model = _padded(model)
    final, config = writable_folder(path), _config(model)
    if final.is_dir() and any(final.iterdir()):
        raise FileExistsError(f"{final} is not empty; choose another path, or remove it first")
    tensors = _tensors(model, config)
    with atomic_write(final) as folder:
        folder.mkdir()
        save_file(tensors, folder / _WEIGHTS, metadata={"format": "pt"})
        tokenizer_for(model, tokenizer).save_pretrained(folder)
        for name, content in {
            "config.json": json.dumps(config, indent=2) + "\n",
            _CONFIG_FILE: _CONFIG_CLASS,
            "generation_config.json": model.generation_config.to_json_string(),
            "README.md": text,
        }.items():
            (folder / name).write_text(content, encoding="utf-8")
        _compare(folder / _WEIGHTS, tensors)
    return final


def _config(model: PreTrainedModel) -> dict[str, Any]:
    """The entries of ``config.json``.

    Raises
    ------
    InvalidArgument
        If the form cannot say what the model is.
    """
    config, anatomy = model.config, Anatomy(model)
    grids = [anatomy.grid("attention", layer) for layer in range(len(anatomy.layers))]
    heads = [groups * per_group for groups, per_group, _ in grids]
    if odd := [layer for layer, count in enumerate(heads) if count not in (0, heads[0])]:
        raise InvalidArgument(
            f"layer 0 has {heads[0]} query heads and layer {odd[0]} has {heads[odd[0]]}, where "
            "vLLM's DeciLMForCausalLM takes one number for all layers; prune the site 'ffn' only, "
            "or as many heads of every layer, or use save_model with portable=True, which pads "
            "the layers with zeros, so that vLLM runs the model as its plain architecture"
        )
    biased = {name.split(".")[-2] for name, _ in model.named_parameters() if name.endswith(".bias")}
    in_qkv, in_o = bool(biased & {*_QKV}), "o_proj" in biased
    rotation = dict(config.rope_parameters)
    window = getattr(config, "sliding_window", None) or config.max_position_embeddings
    return {
        "architectures": ["DeciLMForCausalLM"],
        "model_type": "nemotron-nas",
        "auto_map": {"AutoConfig": f"{Path(_CONFIG_FILE).stem}.DeciLMConfig"},
        "hidden_size": config.hidden_size,
        "num_hidden_layers": len(grids),
        "num_attention_heads": heads[0],
        "head_dim": anatomy.head_dim,
        "intermediate_size": None,  # these two are of each layer
        "num_key_value_heads": None,
        "block_configs": [*map(_block, grids, anatomy.units("ffn"))],
        "hidden_act": config.hidden_act,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": rotation,
        "rope_theta": rotation["rope_theta"],  # where versions before 0.12 look
        "max_position_embeddings": min(config.max_position_embeddings, window),
        "attention_bias": in_o,
        **({"qkv_bias": in_qkv} if in_qkv != in_o else {}),
        "mlp_bias": bool(biased & {*_MLP}),
        "vocab_size": len(model.get_input_embeddings().weight),
        "tie_word_embeddings": bool(config.tie_word_embeddings),
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
        "attention_dropout": 0.0,
        "initializer_range": config.initializer_range,
        "pretraining_tp": 1,
        "use_cache": True,
        "torch_dtype": dtype_name(next(model.parameters()).dtype),
    }


def _block(grid: tuple[int, int, int], width: int) -> dict[str, dict[str, Any]]:
    """What one layer is. An entry ``ffn_mult`` would be read before the width."""
    _, per_group, _ = grid
    common = {"replace_with_linear": False, "sparsify": None}
    return {
        "attention": {**common, "no_op": not per_group, "n_heads_in_group": per_group or None},
        "ffn": {**common, "no_op": not width, "intermediate_size": width or None},
    }


def _padded(model: PreTrainedModel) -> PreTrainedModel:
    """The model, or a copy with units of zeros in dropped blocks that cannot be left out.

    These are such with a bias, and the attention of the first layer.
    """
    anatomy, keep = Anatomy(model), {}
    widths = anatomy.layer_widths()
    heads = max(map(int.__mul__, widths["attention"], widths["balanced_heads"]))
    for part, site, units in (
        ("ffn", "ffn", 1),
        ("attention", "attention", 1),  # one key/value group
        ("attention", "balanced_heads", heads),
    ):
        keep[site] = [[*range(count)] for count in widths[site]]
        for layer, count in enumerate(widths[site]):
            bias = anatomy.module(layer, anatomy.family.consumes[part]).bias
            if not count and (bias is not None or (part == "attention" and layer == 0)):
                keep[site][layer] = [-1] * units
    if all(-1 not in units for layers in keep.values() for units in layers):
        return model
    model = copy.deepcopy(model)
    for site, layers in keep.items():
        set_units(Anatomy(model), {site: layers})
    return model


def _refuse_other_graphs(model: PreTrainedModel) -> None:
    """Refuse a model that vLLM's Llama does not compute."""
    config, family = model.config, dense_type(model.config.model_type)
    instead = "save it with lab.save_model, from which every family reloads"
    if family not in _FAMILIES:
        raise InvalidArgument(
            f"model is of the family {family!r}, which vLLM's DeciLMForCausalLM does not compute; "
            f"expected one of {', '.join(_FAMILIES)}; {instead}"
        )
    if config.hidden_act != "silu":
        raise InvalidArgument(
            f"the model's hidden_act is {config.hidden_act!r}, where vLLM's DeciLMForCausalLM has "
            f"'silu'; {instead}"
        )
    kind = config.rope_parameters.get("rope_type", "default")
    if kind not in _ROTATIONS:
        raise InvalidArgument(
            f"the model's rotary embedding is of type {kind!r}; expected one of "
            f"{', '.join(_ROTATIONS)}; {instead}"
        )


def _tensors(model: PreTrainedModel, config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The model's weights by name, and zeros for the biases that only other layers have."""
    tied = model.all_tied_weights_keys if config["tie_word_embeddings"] else {}
    tensors = {name: each for name, each in model.state_dict().items() if name not in tied}
    in_qkv = config.get("qkv_bias", config["attention_bias"])
    wanted = {**dict.fromkeys(_QKV, in_qkv), "o_proj": config["attention_bias"]}
    wanted |= dict.fromkeys(_MLP, config["mlp_bias"])
    for layer, name, module in Anatomy(model).linears():
        part = "ffn" if ".mlp." in name else "attention"
        if config["block_configs"][layer][part]["no_op"]:
            del tensors[f"{name}.weight"]
        elif wanted[name.rpartition(".")[2]]:
            zeros = module.weight.new_zeros(module.weight.shape[0])
            tensors.setdefault(f"{name}.bias", zeros)
    for layer, parts in enumerate(config["block_configs"]):  # vLLM has no norm of a dropped block
        for part, norm in {"attention": "input", "ffn": "post_attention"}.items():
            if parts[part]["no_op"]:
                del tensors[f"model.layers.{layer}.{norm}_layernorm.weight"]
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def _without_loading(card: str) -> str:
    """A card whose section on loading is vLLM's."""
    section = re.compile(r"## How to load it\n.*?(?=^## |\Z)", re.DOTALL | re.MULTILINE)
    if section.search(card):
        return section.sub(lambda _: _LOADING + "\n", card, count=1)
    return f"{card}\n{_LOADING}"


def _compare(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Refuse a file that does not hold these tensors."""
    with safe_open(path, "pt") as file:
        same = {*file.keys()} == {*tensors} and all(
            torch.equal(file.get_tensor(name), tensor.cpu()) for name, tensor in tensors.items()
        )
    if not same:
        raise RuntimeError(f"the weights read back from {path} differ from the model's")
