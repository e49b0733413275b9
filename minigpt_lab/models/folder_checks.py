"""Check a model's folder before it is loaded: its weight files against its config.

Sizes in a JSON file are not trusted: memory is allocated only for tensors that the headers of the
weight files list.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from ..store import read_json

_PLAIN = {"F64", "F32", "F16", "BF16"}
#: Config entries from which libraries build a list or a model, one item after the other.
_LISTS = {"num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_labels", "extra_ids"}
_SLACK = 2**27  # parameters that a model may have beyond those stored: it is built, then refused
_AGAIN = "save or download it again"
Shapes = Mapping[str, list[int]]  # of tensors, by name


class UnfitFolder(ValueError):
    """A model's folder that cannot be loaded: one sentence says why."""


def damaged(folder: Path | str, why: str, remedy: str = _AGAIN) -> UnfitFolder:
    """Make the error for a damaged folder: its name, what is wrong, what to do."""
    return UnfitFolder(f"{folder} is damaged or incomplete ({why}); {remedy}")


@contextlib.contextmanager
def explain_damage(folder: Path, remedy: str = _AGAIN) -> Iterator[None]:
    """Turn a library's error on reading a folder into an `UnfitFolder`, and silence its log."""
    log = logging.getLogger("transformers")
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
        raise damaged(folder, words if len(words) <= 240 else f"{words[:240]}…", remedy) from error
    finally:
        log.setLevel(level)


def read_object(path: Path) -> dict:
    """Read a JSON file that holds an object; to be called inside `explain_damage`."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise damaged(path.parent, f"{path.name} holds a {type(content).__name__}, not an object")
    return content


def safetensors_files(folder: Path) -> list[Path]:
    """The files that transformers reads a folder's weights from.

    Raises
    ------
    UnfitFolder
        If there are none.
    """
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if index.is_file():
        shards = {Path(str(name)).name for name in read_object(index)["weight_map"].values()}
        return [folder / name for name in sorted(shards)]
    raise damaged(
        folder,
        "it holds no model.safetensors; pickled weights (*.bin, *.pt) are never opened, as they "
        "can run code",
        "save it again with save_pretrained, which writes safetensors",
    )


def stored_shapes(folder: Path) -> Shapes:
    """Name to shape of every tensor in a folder's weight files, from their headers.

    Raises
    ------
    UnfitFolder
        If a file is not there, or a weight is quantised.
    """
    return {k: v for file in safetensors_files(folder) for k, v in read_shapes(file).items()}


def read_shapes(file: Path) -> Shapes:
    """`stored_shapes` of one file."""
    with safe_open(file, framework="pt") as opened:
        entries = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
        for name, entry in entries.items():
            if name.endswith("weight") and entry.get_dtype() not in _PLAIN:
                raise UnfitFolder(
                    f"{file} holds weights of type {entry.get_dtype()} ({name}); expected float32, "
                    "bfloat16, float16 or float64: load the checkpoint it was made from, or "
                    "dequantise it"
                )
        return {name: entry.get_shape() for name, entry in entries.items()}


def check_config(folder: Path, config: Mapping, shapes: Shapes) -> None:
    """Refuse a config that asks for code, or for far more parts than there are tensors.

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
        number = name in _LISTS and isinstance(value, int | float)
        if number and not value <= max(len(shapes), 1000):
            raise damaged(folder, f"{name} is {value} in config.json, for {len(shapes)} tensors")


def check_memory(folder: Path, model: PreTrainedModel, shapes: Shapes) -> None:
    """Refuse a model, on the meta device, that is much larger than the stored weights.

    Raises
    ------
    UnfitFolder
        If its parameters and buffers are twice what the files hold, and many.
    """
    stored = sum(torch.Size(shape).numel() for shape in shapes.values())
    needed = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    if needed > 2 * stored + _SLACK:
        why = f"config.json asks for {needed:,} parameters, the files hold {stored:,}"
        raise damaged(folder, why)


def refuse_unfit(
    folder: Path | str,
    missing: Collection[str],
    unexpected: Collection[str],
    mismatched: Collection[tuple[str, Collection[int], Collection[int]]] = (),
) -> None:
    """Refuse weights that are missing, belong to no layer, or have another shape.

    Raises
    ------
    UnfitFolder
        Naming the first few and how many there are.
    """
    faults = {
        "missing": sorted(missing),
        "of another shape": [
            f"{name} is {[*stored]}, by config.json {[*wanted]}"
            for name, stored, wanted in sorted(mismatched)
        ],
        "of no layer": sorted(unexpected),
    }
    parts = [f"weights {what} ({len(n)}): {first_few(n)}" for what, n in faults.items() if n]
    if parts:
        remedy = "save it again, or use the config.json that was saved with these weights"
        raise damaged(folder, "; ".join(parts), remedy)


def first_few(names: Collection[str], most: int = 3) -> str:
    """The first few names as text, with … if there are more."""
    return ", ".join([*names][:most]) + ("" if len(names) <= most else ", …")
