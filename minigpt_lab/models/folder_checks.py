"""Check a model's folder before it is loaded: its weight files against its config.

Sizes in a JSON file are not trusted: memory is allocated only for tensors that the headers of the
weight files list.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from ..store import read_json

#: Prefixes that torch.compile, DDP, FSDP and activation checkpointing put before weights' names.
WRAPPERS = r"(?:^|(?<=\.))(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."

_PLAIN = {"F64", "F32", "F16", "BF16"}
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_FEW = 2**27  # parameters: a smaller model is built even if weights are missing, then refused
_MOST = 100_000  # entries of lists that libraries build one by one from a number in the config
Tensors = Mapping[str, tuple[list[int], str]]  # name to shape and type
T = TypeVar("T")


class UnfitFolder(ValueError):
    """A model's folder that cannot be loaded: one sentence says why."""


def damaged(folder: Path | str, why: str, remedy: str = "save it again") -> UnfitFolder:
    """Make the error for a damaged folder: its name, what is wrong, what to do."""
    return UnfitFolder(f"{folder} is damaged or incomplete ({why}); {remedy}")


@contextlib.contextmanager
def reading(folder: Path | str) -> Iterator[None]:
    """Turn a library's error on reading a folder into an `UnfitFolder`, and silence its log."""
    log = logging.getLogger("transformers.modeling_utils")
    level = log.level
    log.setLevel(logging.ERROR)  # our error names what is missing
    try:
        yield
    except UnfitFolder:
        raise
    except Exception as error:
        words = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, RecursionError):
            words = "a JSON file is nested too deeply"
        raise damaged(folder, words if len(words) <= 240 else f"{words[:240]}…") from error
    finally:
        log.setLevel(level)


def read_object(path: Path) -> dict:
    """Read a JSON file that holds an object; to be called inside `reading`."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise damaged(path.parent, f"{path.name} holds a {type(content).__name__}, not an object")
    return content


def safetensors_files(folder: Path) -> list[Path]:
    """The files that transformers reads a folder's weights from.

    Raises
    ------
    UnfitFolder
        If there are none, or a shard is missing.
    """
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if index.is_file():
        weight_map = read_object(index)["weight_map"]
        shards = sorted({Path(str(name)).name for name in weight_map.values()})
        missing = [name for name in shards if not (folder / name).is_file()]
        if missing:
            why = f"{listed(missing)} of {len(shards)} shards not there"
            raise damaged(folder, why, "copy or download them again")
        return [folder / name for name in shards]
    files = sorted(path for path in folder.glob("*.safetensors") if path.is_file())
    if not files:
        pickled = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
        raise damaged(
            folder,
            "it holds no *.safetensors" + (f", but {listed(pickled)}" if pickled else ""),
            "pickled weights are never opened, as they can run code: save it again with "
            "save_pretrained, which writes safetensors",
        )
    return files


def stored_tensors(folder: Path) -> dict[str, tuple[list[int], str]]:
    """Name to shape and type of every tensor in a folder's weight files, from their headers.

    Raises
    ------
    UnfitFolder
        If a file is not there, or a weight is quantised.
    """
    tensors = {}
    for file in safetensors_files(folder):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (no mapping)
                entry = opened.get_slice(name)
                tensors[name] = entry.get_shape(), entry.get_dtype()
    odd = [n for n, (_, dtype) in tensors.items() if n.endswith("weight") and dtype not in _PLAIN]
    if odd:
        raise UnfitFolder(
            f"{folder} holds weights of type {tensors[odd[0]][1]} ({listed(odd)}); expected "
            "float32, bfloat16, float16 or float64: load the checkpoint it was made from, or "
            "dequantise it"
        )
    return tensors


def check_config(folder: Path, config: Mapping, tensors: Collection[str]) -> None:
    """Refuse a config that asks for code, or for more parts than there are tensors.

    Raises
    ------
    UnfitFolder
        Naming the entry.
    """
    for name, value in config.items():
        if "attn_implementation" in name and "/" in str(value):
            raise UnfitFolder(
                f"{folder / 'config.json'}: {name} is {value!r}, code from the hub, which is never "
                "run; remove the entry"
            )
        if not isinstance(value, int | float):
            continue
        if name in _LAYERS and not value <= len(tensors):
            why = f"asks for {value} layers, the files hold {len(tensors)} tensors"
            raise damaged(folder, f"config.json {why}")
        if name in ("num_labels", "extra_ids") and not value <= _MOST:
            raise damaged(folder, f"{name} is {value} in config.json")


def by_model_names(model: PreTrainedModel, tensors: Mapping[str, T]) -> dict[str, T]:
    """Rename tensors to a model's names: drop wrappers, add the prefix that a base model lacks."""
    state, renamed = model.state_dict(), {}
    for name, tensor in tensors.items():
        name = re.sub(WRAPPERS, "", name)
        full = f"{model.base_model_prefix}.{name}"
        renamed[full if full in state and name not in state else name] = tensor
    return renamed


def check_memory(folder: Path | str, model: PreTrainedModel, tensors: Tensors) -> None:
    """Refuse a config whose model would take much more memory than the stored weights.

    Parameters
    ----------
    folder : str or path
        Named in the error.
    model : transformers.PreTrainedModel
        The config's model on the meta device.
    tensors : mapping
        From `stored_tensors`.

    Raises
    ------
    UnfitFolder
        If the model has many parameters, and more than the files hold, or larger buffers than
        parameters.
    """
    held = sum(torch.Size(shape).numel() for shape, _ in tensors.values())
    needed = model.num_parameters()
    if needed > max(held, _FEW):
        check_weights(folder, model, tensors, unexpected=False)
    computed = sum(buffer.numel() for buffer in model.buffers())  # at construction
    if computed > max(needed, 2**24):
        raise damaged(folder, f"config.json asks for {computed:,} numbers beside the weights")


def check_weights(
    folder: Path | str, model: PreTrainedModel, tensors: Tensors, unexpected: bool = True
) -> None:
    """Refuse files whose tensors differ from a model's in name or shape.

    Raises
    ------
    UnfitFolder
        Naming the first few and how many there are.
    """
    stored = {name: shape for name, (shape, _) in by_model_names(model, tensors).items()}
    wanted = {name: [*tensor.shape] for name, tensor in model.state_dict().items()}
    both = wanted.keys() & stored.keys()
    refuse_unfit(
        folder,
        wanted.keys() - both - model.all_tied_weights_keys.keys(),
        stored.keys() - both if unexpected else (),
        [(name, stored[name], wanted[name]) for name in both if stored[name] != wanted[name]],
    )


def refuse_unfit(
    folder: Path | str,
    missing: Collection[str],
    unexpected: Collection[str],
    mismatched: Collection[tuple[str, Collection[int], Collection[int]]],
) -> None:
    """Refuse weights that are missing, belong to no layer, or have another shape.

    Raises
    ------
    UnfitFolder
        Naming the first few and how many there are.
    """
    parts = []
    if missing:
        parts.append(f"{_weights(missing)} missing: {listed(sorted(missing))}")
    if mismatched:
        name, stored, wanted = min(mismatched)
        parts.append(
            f"{len(mismatched)} of another shape: {name} is {[*stored]}, by config.json {[*wanted]}"
        )
    if unexpected:
        parts.append(f"{_weights(unexpected)} of no layer: {listed(sorted(unexpected))}")
    if parts:
        remedy = "save it again, or use the config.json that was saved with these weights"
        raise damaged(folder, "; ".join(parts), remedy)


def _weights(names: Collection[str]) -> str:
    """``1 weight is`` or ``n weights are``."""
    return "1 weight is" if len(names) == 1 else f"{len(names)} weights are"


def listed(names: Collection[str], most: int = 3) -> str:
    """The first few names as text, with … if there are more."""
    names = list(names)
    return ", ".join(names[:most]) + ("" if len(names) <= most else ", …")
