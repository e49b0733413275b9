"""Which of llama.cpp's graphs runs a model, with the numbers and tensors that it reads.

The graph ``llama`` reads one FFN width and one number of heads, those of layer 0; ``deci`` is the
same computation with arrays of them, one entry per layer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import gguf
import numpy as np
import torch
from transformers import PreTrainedModel

from ..architectures import dense_type
from ..checks import InvalidArgument
from ..models import Anatomy, is_linear, padding, rebuild_layer, set_units, weight_axis
from .rounding import padded_width

#: Graph of a family whose layers are alike. Families that are not listed cannot be written.
_GRAPHS = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "phi": "phi2",
    "gpt2": "gpt2",
    "gpt_neox": "gptneox",
    "bloom": "bloom",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
}

#: Config fields to the values with which a graph computes what transformers does. GPT-NeoX's exact
#: GELU is an approximation by tanh in llama.cpp: its logits differ by about 0.001.
_REQUIRED: dict[str, dict[str, tuple]] = {
    "llama": {"hidden_act": ("silu",)},
    "qwen2": {"hidden_act": ("silu",)},
    "qwen3": {"hidden_act": ("silu",)},
    "phi2": {"hidden_act": ("gelu_new",)},
    "gpt2": {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
    },
    "gptneox": {"hidden_act": ("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh")},
    "gemma": {"hidden_act": ("gelu_pytorch_tanh",)},
    "gemma2": {"hidden_activation": ("gelu_pytorch_tanh",)},
    "gemma3": {"hidden_activation": ("gelu_pytorch_tanh",)},
    "bloom": {"apply_residual_connection_post_layernorm": (False,)},
}

#: Graphs whose rotary embedding turns neighbouring features (0, 1), (2, 3), …; transformers turns
#: feature i with i + dim / 2, so the rows of queries and keys change their places. They also take
#: a bias of every projection and factors of the rotary frequencies.
_INTERLEAVED = ("llama", "deci")

#: Graphs in which the heads of a layer together are as wide as the model.
_ALL_HEADS = ("phi2", "gpt2", "gptneox", "bloom")

#: Graphs whose norms multiply by the weights of the file; transformers' by one more than its own.
_NORMS_FROM_ZERO = ("gemma", "gemma2", "gemma3")

#: Graphs with full attention in every n-th layer, and a window in the others.
_FULL_IN_EVERY = {"gemma2": 2, "gemma3": 6}
#: Set in Gemma 2, and the same keys in the file; not in Gemma 3.
_SOFT_CAPS = ("attn_logit_softcapping", "final_logit_softcapping")

_INSTEAD = "save it with lab.save_model, from which every family reloads"


@dataclass(frozen=True)
class FileTensor:
    """One tensor of the file.

    Parameters
    ----------
    name : str
        llama.cpp's name.
    kind : str
        GGUF type.
    shape : tuple of int
        As NumPy has it: the last axis is the row that is rounded in blocks.
    values : callable
        Gives the values in float32, when they are needed.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    values: Callable[[], np.ndarray]


def graph_of(model: PreTrainedModel) -> str:
    """Name of the graph in llama.cpp that computes what a model does.

    Raises
    ------
    InvalidArgument
        If there is none; the message says what would work.
    """
    config, family = model.config, dense_type(model.config.model_type)
    if family not in _GRAPHS:
        raise InvalidArgument(
            f"model is of the family {family!r}, which is not written as GGUF; expected one of "
            f"{', '.join(_GRAPHS)}; {_INSTEAD}"
        )
    graph = _GRAPHS[family]
    for field, allowed in _REQUIRED[graph].items():
        value = getattr(config, field)
        if value not in allowed:
            raise InvalidArgument(
                f"the model's {field} is {value!r}, where llama.cpp's graph {graph!r} has "
                f"{allowed[0]!r}; {_INSTEAD}"
            )
    _refuse_odd_rotation(model, graph)
    if n := _FULL_IN_EVERY.get(graph):
        layers = enumerate(config.layer_types, 1)
        alike = all((kind == "full_attention") == (i % n == 0) for i, kind in layers)
        capped = {bool(getattr(config, name)) for name in _SOFT_CAPS} == {graph == "gemma2"}
        if not (alike and capped) or config.query_pre_attn_scalar != config.head_dim:
            raise InvalidArgument(
                f"the model's attention is not that of llama.cpp's graph {graph!r} (full in one "
                f"layer of {n}, scaled by the width of a head, {_SOFT_CAPS[0]} "
                f"{'set' if graph == 'gemma2' else 'not set'}); {_INSTEAD}"
            )
    if graph in _INTERLEAVED:
        return graph if _layers_are_alike(model) else "deci"
    scaled = _rotary_factors(model) is not None
    biases = {name.split(".")[-2] for name, _ in model.named_parameters() if name.endswith("bias")}
    biased = graph in ("qwen2", "qwen3") and not biases <= {"q_proj", "k_proj", "v_proj"}
    if graph == "qwen2" and (scaled or biased or not _layers_are_alike(model)):
        return "deci"
    if scaled or biased:
        what = "scaled rotary frequencies" if scaled else "biases of the projections o and down"
        raise InvalidArgument(
            f"the model has {what}, which llama.cpp's graph {graph!r} lacks; {_INSTEAD}"
        )
    return graph


def _layers_are_alike(model: PreTrainedModel) -> bool:
    widths = Anatomy(model).layer_widths().values()
    return all(len({*counts}) == 1 and counts[0] for counts in widths)


def padded(model: PreTrainedModel, graph: str) -> PreTrainedModel:
    """The model itself, or a copy with units of zeros where a graph takes one width only.

    ``deci`` takes any width, but reads the width of a head only if layer 0 has some, and no bias of
    attention without heads: such layers get one head of zeros.
    """
    units = Anatomy(model).layer_widths()
    if graph == "deci":
        return _with_needed_heads(model)
    widths = {site: max(1, *counts) for site, counts in units.items()}
    if graph in _ALL_HEADS:
        heads = model.config.hidden_size // Anatomy(model).head_dim
        widths["attention"] = heads // widths["balanced_heads"]
    if all({*units[site]} == {width} for site, width in widths.items()):
        return model
    model = copy.deepcopy(model)
    anatomy = Anatomy(model)
    for site, width in widths.items():
        layers = range(len(anatomy.layers))
        set_units(anatomy, {site: [padding(anatomy, site, layer, width) for layer in layers]})
    return model


def _with_needed_heads(model: PreTrainedModel) -> PreTrainedModel:
    """The model itself, or a copy with a head of zeros where ``deci`` needs one."""
    anatomy = Anatomy(model)
    reader = anatomy.family.consumes["attention"]
    layers = [
        layer
        for layer, groups in enumerate(anatomy.units("attention"))
        if not groups and (layer == 0 or anatomy.module(layer, reader).bias is not None)
    ]
    if not layers:
        return model
    model = copy.deepcopy(model)
    for layer in layers:
        for site in ("attention", "balanced_heads"):
            rebuild_layer(Anatomy(model), site, layer, [-1])
    return model


def _refuse_odd_rotation(model: PreTrainedModel, graph: str) -> None:
    """Refuse a rotary embedding that a factor for each frequency does not describe."""
    rotary = getattr(model.base_model, "rotary_emb", None)
    if rotary is None:
        return
    if isinstance(rotary.rope_type, dict):  # Gemma 3: one for each kind of layer
        if odd := sorted({*rotary.rope_type.values()} - {"default"}):
            raise InvalidArgument(
                f"the model's rotary embedding is of type {odd[0]!r} in some layers, which "
                f"llama.cpp's graph {graph!r} lacks; {_INSTEAD}"
            )
        return
    whole = graph in _ALL_HEADS or 2 * len(rotary.inv_freq) == Anatomy(model).head_dim
    if rotary.rope_type in ("dynamic", "longrope") or rotary.attention_scaling != 1 or not whole:
        raise InvalidArgument(
            f"the model's rotary embedding is of type {rotary.rope_type!r}; expected 'default', "
            f"'linear' or 'llama3' over the whole head; {_INSTEAD}"
        )


def _rotary_factors(model: PreTrainedModel) -> np.ndarray | None:
    """Plain frequencies over the model's, ``theta^(-2i / dim) / f_i``; None if all are 1."""
    rotary = getattr(model.base_model, "rotary_emb", None)
    if rotary is None or isinstance(rotary.rope_type, dict):
        return None
    # computed anew: those of a model that was cast to bfloat16 are rounded
    frequencies = type(rotary)(rotary.config).inv_freq.double().numpy()
    exponents = np.arange(len(frequencies)) / len(frequencies)
    factors = model.config.rope_parameters["rope_theta"] ** -exponents / frequencies
    return None if np.allclose(factors, 1, rtol=1e-4) else factors.astype(np.float32)


def ffn_widths(model: PreTrainedModel, kind: str) -> list[int]:
    """Widths of the FFNs in the file: channels of zeros fill the last block of each row.

    An FFN without channels gets some too: ``deci`` drops the attention of a layer that has no FFN.
    """
    return [padded_width(max(width, 1), kind) for width in Anatomy(model).units("ffn")]


def hyperparameters(model: PreTrainedModel, graph: str, ffn: list[int]) -> dict[str, object]:
    """Metadata of the graph, by llama.cpp's keys; a list holds one entry per layer.

    Parameters
    ----------
    ffn : list of int
        Widths of the FFNs in the file.
    """
    config, anatomy = model.config, Anatomy(model)
    grids = [anatomy.grid("attention", layer) for layer in range(len(anatomy.layers))]
    widths = {
        "feed_forward_length": ffn,
        "attention.head_count": [groups * heads for groups, heads, _ in grids],
        "attention.head_count_kv": [groups for groups, _, _ in grids],
    }
    longest = getattr(config, "max_position_embeddings", 2048)  # BLOOM has no limit of its own
    # Beyond a sliding window, which these graphs lack, the logits would differ.
    window = getattr(config, "sliding_window", None) or longest
    numbers = {
        "context_length": longest if graph in _FULL_IN_EVERY else min(longest, window),
        "embedding_length": config.hidden_size,
        "block_count": len(grids),
        **(widths if graph == "deci" else {key: values[0] for key, values in widths.items()}),
        "attention.key_length": anatomy.head_dim,
        "attention.value_length": anatomy.head_dim,
        "vocab_size": len(model.get_input_embeddings().weight),
    }
    if hasattr(config, "rms_norm_eps"):
        numbers["attention.layer_norm_rms_epsilon"] = float(config.rms_norm_eps)
    else:
        names = ("layer_norm_eps", "layer_norm_epsilon")
        epsilon = next(getattr(config, name) for name in names if hasattr(config, name))
        numbers["attention.layer_norm_epsilon"] = float(epsilon)
    if graph in _FULL_IN_EVERY:
        numbers["attention.sliding_window"] = window
    if graph == "gemma2":
        numbers |= {name: float(getattr(config, name)) for name in _SOFT_CAPS}
    if graph == "gemma3":
        rope = config.rope_parameters
        numbers["rope.dimension_count"] = anatomy.head_dim
        numbers["rope.freq_base"] = float(rope["full_attention"]["rope_theta"])
        numbers["rope.freq_base_swa"] = float(rope["sliding_attention"]["rope_theta"])
    elif hasattr(model.base_model, "rotary_emb"):
        numbers["rope.dimension_count"] = 2 * len(model.base_model.rotary_emb.inv_freq)
        numbers["rope.freq_base"] = float(config.rope_parameters["rope_theta"])
    if hasattr(config, "use_parallel_residual"):
        numbers["use_parallel_residual"] = config.use_parallel_residual
    return {f"{graph}.{key}": value for key, value in numbers.items()}


def file_tensors(
    model: PreTrainedModel, graph: str, kinds: dict[str, str], ffn: list[int]
) -> Iterator[FileTensor]:
    """Tensors of the file, in the order of the model's parameters.

    Parameters
    ----------
    kinds : dict
        Name of a module to the type of its weight; all else is float32.
    ffn : list of int
        Widths of the FFNs in the file.
    """
    anatomy = Anatomy(model)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[graph.upper()], len(anatomy.layers))
    factors = _rotary_factors(model)
    if factors is not None:
        yield FileTensor("rope_freqs.weight", "F32", factors.shape, factors.copy)
    prefix = f"{model.base_model_prefix}."
    no_heads = [i for i, groups in enumerate(anatomy.units("attention")) if not groups]
    for parameter_name, parameter in model.named_parameters():
        path, _, leaf = parameter_name.rpartition(".")
        name = names.get_name(path.removeprefix(prefix)) or names.get_name(path)
        if name is None:
            raise InvalidArgument(
                f"llama.cpp's graph {graph!r} has no place for {parameter_name}; {_INSTEAD}"
            )
        module, order = model.get_submodule(path), None
        transposed = is_linear(module) and leaf == "weight" and weight_axis(module, "output") == 1
        shape = [*parameter.shape][:: -1 if transposed else 1]
        if name.startswith("blk."):
            layer, part = int(name.split(".")[1]), name.split(".")[2]
            if layer in no_heads and part.startswith("attn"):  # read only where there are heads
                continue
            order = _row_order(anatomy, graph, layer, part)
            if part in ("ffn_gate", "ffn_up"):
                shape[0] = ffn[layer]
            elif (part, leaf) == ("ffn_down", "weight"):
                shape[1] = ffn[layer]
        kind = kinds.get(path, "F32") if leaf == "weight" else "F32"
        if graph in _NORMS_FROM_ZERO and name.endswith("norm"):
            parameter = 1 + parameter.float()
        values = partial(_arranged, parameter, transposed, order, tuple(shape))
        yield FileTensor(f"{name}.{leaf}", kind, tuple(shape), values)


def _row_order(anatomy: Anatomy, graph: str, layer: int, part: str) -> np.ndarray | None:
    """Rows of a projection in the order of the file, None if that is the model's."""
    groups, per_group, head_dim = anatomy.grid("attention", layer)
    heads = {"attn_q": groups * per_group, "attn_k": groups}
    if part in heads and graph in _INTERLEAVED:
        halves = np.arange(heads[part] * head_dim).reshape(-1, 2, head_dim // 2)
        return halves.swapaxes(1, 2).ravel()  # [head, dim / 2, half]
    if part == "attn_qkv":  # all queries, all keys, all values
        fused = anatomy.family.produces["attention"][0]
        blocks = (anatomy.unit_features(fused, layer, block=block) for block in fused.blocks)
        return np.concatenate([block.ravel() for block in blocks])
    return None


def _arranged(
    parameter: torch.Tensor, transposed: bool, order: np.ndarray | None, shape: tuple[int, ...]
) -> np.ndarray:
    """Values of a parameter in float32, with rows in another order and padded by zeros."""
    values = (parameter.T if transposed else parameter).detach().float().cpu().numpy()
    values = values if order is None else values[order]
    return np.pad(values, [(0, new - old) for old, new in zip(values.shape, shape, strict=True)])
