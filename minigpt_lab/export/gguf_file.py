"""Write a model as one GGUF file for llama.cpp, read it back, then give it its name."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..checks import Location, Model, OneOf, Tokenizer, checked, writable_file
from ..models import Anatomy, label, origin_of, tokenizer_for
from ..store import atomic_write
from .byte_pairs import tokenizer_fields
from .graphs import FileTensor, ffn_widths, file_tensors, graph_of, hyperparameters, padded
from .rounding import (
    FALLBACK,
    KINDS,
    block_size,
    decode,
    encode,
    matrix_kinds,
    refuse_unusable_weights,
)

_ALIGNMENT = 32  # bytes; every tensor begins at a multiple


@dataclass(frozen=True)
class _Content:
    """What a file is to hold: the name of the graph, metadata by key, and tensors."""

    graph: str
    fields: dict[str, object]
    tensors: list[FileTensor]
    channels: int  # of all FFNs


_CHECKS = {
    "model": Model(),
    "tokenizer": Tokenizer(),
    "kind": OneOf(KINDS),
    "embedding": OneOf(KINDS) | None,
}


@checked(**_CHECKS, path=Location())
@torch.no_grad()
def export_gguf(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    path: str | os.PathLike,
    *,
    kind: str = "F16",
    embedding: str | None = None,
) -> Path:
    """Write a model and its tokenizer as a GGUF file, which llama.cpp runs.

    Llama (SmolLM too), Mistral, Qwen2, Qwen3, Phi, GPT-2, GPT-NeoX, BLOOM and Gemma (1, 2, 3), with
    the BPE tokenizers of GPT-2, SmolLM, Qwen2, Llama, Mistral, BLOOM or Gemma, trimmed or not. A
    Llama, Mistral or Qwen2 whose layers have different numbers of FFN channels or key/value groups
    gets llama.cpp's architecture ``deci``, which takes a width per layer, also 0: a dropped block
    gets units of zeros only where that graph cannot do without (an FFN; the first layer's
    attention, or one that adds a bias). In the other families, layers are padded with units of
    zeros to the widest, and in Phi, GPT-2, GPT-NeoX and BLOOM to the dense model's heads: such a
    file is larger than need be.

    Linear layers and token embedding get the type `kind`; norms, biases and positions are float32.

    The blocks of 32 weights that a type with a ``Q`` rounds together must fill a row: rows of the
    FFN's second matrix are padded with channels of zeros (prune with ``multiple_of=32`` to need
    none); other matrices whose rows are no multiple of 32 are stored as F16.

    The file is written under a temporary name, read back and compared with the model, tensor by
    tensor and field by field, before it gets its name.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Dense or shrunk.
    tokenizer : transformers.PreTrainedTokenizerBase
        The model's tokenizer; for a model with a trimmed vocabulary the original one may be given.
    path : str or path
        Of the file, e.g. ``"medical-mini.gguf"``; there must be none.
    kind : {"F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"}
        Type of the linear layers.
    embedding : str, optional
        Type of the token embedding and the output head; by default ``"Q8_0"`` where `kind` has 4 or
        5 bits, as llama.cpp's own tool keeps them finer, else `kind`.

    Returns
    -------
    pathlib.Path
        Of the file.

    Raises
    ------
    FileExistsError
        If there is something at `path`.
    ValueError
        If llama.cpp has no graph for the model, GGUF cannot describe the tokenizer, the model is
        under a mask or offloaded, or a weight is not finite or too large for float16.
    OSError
        If the disk refuses; no file is left.
    RuntimeError
        If what was read back differs.
    """
    final = writable_file(path)
    if os.path.lexists(final):
        raise FileExistsError(f"{final} exists; choose another path, or remove it first")
    content = _content(model, tokenizer, kind, embedding)
    if filled := _filled(model, content, kind):
        warnings.warn(filled, stacklevel=4)
    with atomic_write(final) as staging:
        _write_header(staging, content)
        with staging.open("ab") as file:
            for tensor in content.tensors:
                _align(file)
                file.write(encode(tensor.values(), tensor.kind).tobytes())
            _align(file)
        _compare(staging, content)
    return final


@checked(**_CHECKS)
def gguf_size(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    kind: str = "F16",
    embedding: str | None = None,
) -> int:
    """Bytes of the file that `export_gguf` would write with the same arguments.

    Raises
    ------
    ValueError
        If it would refuse the model or the tokenizer.
    """
    content = _content(model, tokenizer, kind, embedding)
    with tempfile.TemporaryDirectory() as folder:
        header = Path(folder) / "header.gguf"
        _write_header(header, content)
        total = header.stat().st_size
    for tensor in content.tensors:
        total = _aligned(total) + _stored_bytes(tensor)
    return _aligned(total)


def _content(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, kind: str, embedding: str | None
) -> _Content:
    """Fields and tensors of a model's file."""
    refuse_unusable_weights(model, "export_gguf")
    graph, name, own = graph_of(model), label(model), tokenizer_for(model, tokenizer)
    model = padded(model, graph)
    ffn, rows = ffn_widths(model, kind), len(model.get_input_embeddings().weight)
    licence = origin_of(model).get("licence")
    file_type = "ALL_F32" if kind == "F32" else f"MOSTLY_{kind}"
    fields = {
        "general.type": "model",
        "general.name": name,
        **({"general.license": licence} if licence else {}),
        "general.file_type": int(gguf.LlamaFileType[file_type]),
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
        **hyperparameters(model, graph, ffn),
        **tokenizer_fields(own, rows),
    }
    kinds = matrix_kinds(model, kind, embedding)
    return _Content(graph, fields, list(file_tensors(model, graph, kinds, ffn)), sum(ffn))


def _filled(model: PreTrainedModel, content: _Content, kind: str) -> str:
    """What the file holds beside the model so that llama.cpp can read it, in words."""
    channels = content.channels - sum(Anatomy(model).units("ffn"))
    layers = [tensor for tensor in content.tensors if tensor.name.startswith("blk.")]
    others, size = sum(tensor.kind == FALLBACK for tensor in layers), block_size(kind)
    said = [f"{channels:,} FFN channels of zeros are added"] * (channels > 0)
    said += [f"{others} matrices are stored as {FALLBACK}"] * (size > 1 and others > 0)
    if not said:
        return ""
    if size == 1:
        return f"{said[0]}: {content.graph} takes layers of one width; prune uniformly to avoid it"
    return (
        f"{' and '.join(said)}: rows of {kind} are whole blocks of {size}; see multiple_of={size}"
    )


def _write_header(path: Path, content: _Content) -> None:
    """Write all but the tensors' values."""
    writer = gguf.GGUFWriter(path, content.graph)
    adders: dict[type, Callable] = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    for key, value in content.fields.items():
        adders[type(value)](key, value)
    for tensor in content.tensors:
        writer.add_tensor_info(
            tensor.name,
            tensor.shape,
            np.dtype(np.float32),
            _stored_bytes(tensor),
            raw_dtype=gguf.GGMLQuantizationType[tensor.kind],
        )
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()


def _stored_bytes(tensor: FileTensor) -> int:
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[tensor.kind]]
    return int(np.prod(tensor.shape)) // block * size


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGNMENT) * _ALIGNMENT


def _align(file) -> None:
    file.write(bytes(_aligned(file.tell()) - file.tell()))


def _compare(path: Path, content: _Content) -> None:
    """Refuse a file that does not hold what it should.

    Raises
    ------
    RuntimeError
        Naming the first field or tensor that differs.
    """
    reader = gguf.GGUFReader(path)
    for key, value in {"general.architecture": content.graph, **content.fields}.items():
        found = reader.fields[key].contents() if key in reader.fields else None
        if found != (float(np.float32(value)) if isinstance(value, float) else value):
            raise RuntimeError(f"the file's {key} differs from the model's ({found!r:.60})")
    stored = {tensor.name: tensor for tensor in reader.tensors}
    if stored.keys() != {tensor.name for tensor in content.tensors}:
        raise RuntimeError("the file's tensors are not those of the model")
    for tensor in content.tensors:
        found = stored[tensor.name]
        values = decode(found.data, tensor.kind)
        if found.tensor_type.name != tensor.kind or values.shape != tensor.shape:
            raise RuntimeError(f"the file's tensor {tensor.name} has another type or shape")
        if not np.array_equal(values, decode(encode(tensor.values(), tensor.kind), tensor.kind)):
            raise RuntimeError(f"the file's tensor {tensor.name} differs from the model's")
