"""Which of llama.cpp's graphs runs a model, with the numbers and tensors that it reads.

The graph ``llama`` reads one FFN width and one number of heads, those of layer 0; ``deci`` is the
same computation with arrays of them, one entry per layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import gguf
import numpy as np
import torch
from transformers import PreTrainedModel

from ..architectures import dense_type
from ..checks import InvalidArgument
from ..models import Anatomy
from .rounding import padded_width

#: Graph of a family whose layers are alike. Families that are not listed cannot be written.
_GRAPHS = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}

#: Graphs whose rotary embedding turns neighbouring features (0, 1), (2, 3), …; transformers turns
#: feature i with i + dim / 2, so the rows of queries and keys change their places. They also take
#: a bias of every projection and factors of the rotary frequencies.
_INTERLEAVED = ("llama", "deci")

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
    if config.hidden_act != "silu":
        raise InvalidArgument(
            f"the model's FFN has the activation {config.hidden_act!r}, where llama.cpp's graph "
            f"has 'silu'; {_INSTEAD}"
        )
    _refuse_odd_rotation(model)
    graph = _GRAPHS[family]
    alike = all(len({*widths}) == 1 for widths in Anatomy(model).layer_widths().values())
    if graph in _INTERLEAVED:
        return graph if alike else "deci"
    biased = {name.split(".")[-2] for name, _ in model.named_parameters() if name.endswith("bias")}
    missing = {
        "layers of different widths": not alike,
        "biases outside of q, k and v": not biased <= {"q_proj", "k_proj", "v_proj"},
        "scaled rotary frequencies": _rotary_factors(model) is not None,
    }
    if not any(missing.values()):
        return graph
    if graph == "qwen2":
        return "deci"
    what = next(words for words, found in missing.items() if found)
    raise InvalidArgument(
        f"the model is a {family} with {what}, which llama.cpp's graph {graph!r} lacks; prune all "
        f"layers alike and without bias compensation, or {_INSTEAD}"
    )


def _refuse_odd_rotation(model: PreTrainedModel) -> None:
    """Refuse a rotary embedding that a factor for each frequency does not describe."""
    rotary = model.base_model.rotary_emb
    whole = 2 * len(rotary.inv_freq) == Anatomy(model).head_dim
    if rotary.rope_type in ("dynamic", "longrope") or rotary.attention_scaling != 1 or not whole:
        raise InvalidArgument(
            f"the model's rotary embedding is of type {rotary.rope_type!r}; expected 'default', "
            f"'linear' or 'llama3' over the whole head; {_INSTEAD}"
        )


def _rotary_factors(model: PreTrainedModel) -> np.ndarray | None:
    """Plain frequencies over the model's, ``theta^(-2i / dim) / f_i``; None if all are 1."""
    frequencies = model.base_model.rotary_emb.original_inv_freq.double().cpu().numpy()
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
    # Beyond a sliding window, which these graphs lack, the logits would differ.
    window = getattr(config, "sliding_window", None) or config.max_position_embeddings
    numbers = {
        "context_length": min(config.max_position_embeddings, window),
        "embedding_length": config.hidden_size,
        "block_count": len(grids),
        **(widths if graph == "deci" else {key: values[0] for key, values in widths.items()}),
        "attention.key_length": anatomy.head_dim,
        "attention.value_length": anatomy.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": anatomy.head_dim,
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "vocab_size": len(model.get_input_embeddings().weight),
    }
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
    for parameter_name, parameter in model.named_parameters():
        path, _, leaf = parameter_name.rpartition(".")
        name, shape, heads = names.get_name(path), [*parameter.shape], None
        if name is None:
            raise InvalidArgument(
                f"llama.cpp's graph {graph!r} has no place for {parameter_name}; {_INSTEAD}"
            )
        if name.startswith("blk."):
            layer, part = int(name.split(".")[1]), name.split(".")[2]
            groups, per_group, _ = anatomy.grid("attention", layer)
            if graph in _INTERLEAVED:
                heads = {"attn_q": groups * per_group, "attn_k": groups}.get(part)
            if part in ("ffn_gate", "ffn_up"):
                shape[0] = ffn[layer]
            elif (part, leaf) == ("ffn_down", "weight"):
                shape[1] = ffn[layer]
        kind = kinds.get(path, "F32") if leaf == "weight" else "F32"
        values = partial(_arranged, parameter, heads, tuple(shape))
        yield FileTensor(f"{name}.{leaf}", kind, tuple(shape), values)


def _arranged(parameter: torch.Tensor, heads: int | None, shape: tuple[int, ...]) -> np.ndarray:
    """Values of a parameter in float32, rows interleaved in each of some heads, padded by zeros."""
    values = parameter.detach().float().cpu().numpy()
    if heads is not None:
        halves = values.reshape(heads, 2, -1, *values.shape[1:])  # [head, half, dim / 2, …]
        values = halves.swapaxes(1, 2).reshape(values.shape)
    return np.pad(values, [(0, new - old) for old, new in zip(values.shape, shape, strict=True)])
