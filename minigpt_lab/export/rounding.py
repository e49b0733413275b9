"""The types of GGUF: which matrix gets which type, and the rounding of its rows."""

from __future__ import annotations

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants
from torch import nn
from transformers import PreTrainedModel

from ..models import (
    Anatomy,
    is_linear,
    is_masked,
    is_offloaded,
    label,
    refuse_non_finite,
    weight_axis,
)

#: Types of weights, by llama.cpp's names. A block of 32 weights of a row has one scale in float16
#: (and one minimum in Q4_1 and Q5_1): 8.5, 4.5, 5, 5.5 and 6 bits per weight for the last five.
KINDS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")

#: What a row is stored in whose length is no multiple of the block.
FALLBACK = "F16"


def block_size(kind: str) -> int:
    """Number of weights in a row that share a scale; 1 for plain numbers."""
    return GGML_QUANT_SIZES[GGMLQuantizationType[kind]][0] if kind[0] == "Q" else 1


def encode(values: np.ndarray, kind: str) -> np.ndarray:
    """Rows ``[…, width]`` of float32 as the file stores them.

    Raises
    ------
    ValueError
        If a value is too large for the type.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        encoded = quants.quantize(np.ascontiguousarray(values), GGMLQuantizationType[kind])
    if not np.isfinite(decode(encoded, kind)).all():
        raise ValueError(
            f"weights up to {np.abs(values).max():.3g} are beyond the range of {kind}; choose kind "
            "'BF16' or 'F32'"
        )
    return encoded


def decode(encoded: np.ndarray, kind: str) -> np.ndarray:
    """Rows ``[…, width]`` of float32 from what the file stores."""
    return quants.dequantize(encoded, GGMLQuantizationType[kind])


def padded_width(width: int, kind: str) -> int:
    """A row's length in the file: the next multiple of the block."""
    block = block_size(kind)
    return -(-width // block) * block


def matrix_kinds(model: PreTrainedModel, kind: str, embedding: str | None) -> dict[str, str]:
    """Module name to the type of its weight, for all matrices that are rounded.

    These are the linear layers and the token embedding; norms, biases and positions stay float32.
    A weight that two modules share is listed once.
    """
    if embedding is None:
        embedding = "Q8_0" if kind[:2] in ("Q4", "Q5") else kind
    anatomy = Anatomy(model)
    padded = {anatomy.name(i, anatomy.family.consumes["ffn"]) for i in range(len(anatomy.layers))}
    tokens = (model.get_input_embeddings(), model.get_output_embeddings())
    kinds, seen = {}, set()
    for name, module in model.named_modules():
        if not (is_linear(module) or module in tokens) or id(module.weight) in seen:
            continue
        seen.add(id(module.weight))
        wanted = embedding if module in tokens else kind
        fits = module.weight.shape[input_axis(module)] % block_size(wanted) == 0
        kinds[name] = wanted if fits or name in padded else FALLBACK
    return kinds


def input_axis(module: nn.Module) -> int:
    """Axis of a matrix's inputs; a token embedding's are its rows' features."""
    return weight_axis(module, "input") if is_linear(module) else 1


def input_rows(module: nn.Module) -> np.ndarray:
    """A matrix as the file has it: float32 ``[output feature or token, input feature]``."""
    weight = module.weight.detach().movedim(input_axis(module), 1)
    return weight.float().cpu().numpy()


def refuse_unusable_weights(model: PreTrainedModel, use: str) -> None:
    """Refuse a model whose weights are not at hand as they are, or are damaged.

    Raises
    ------
    ValueError
        If it is under a mask, its weights are offloaded, or one is not finite.
    """
    if is_masked(model):
        raise ValueError(
            f"the model is under a mask, whose zeros {use} would keep for good; use shrink(model, "
            "plan), or leave the with block first"
        )
    if is_offloaded(model):
        raise ValueError(
            f"the model's weights are offloaded; for {use} load it without (device_map=None)"
        )
    refuse_non_finite(model, label(model))
