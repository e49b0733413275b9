"""Load a model by name: an embedded one, from the hub, a local folder or a saved mini-GPT.

A saved mini-GPT is an ordinary Hugging Face folder with one more file, ``minigpt_lab.json``: the
plans that made it, its trimmed vocabulary, and the files that `save_model` wrote.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..checks import (
    GLOBAL_STATE,
    Device,
    Dtype,
    Location,
    OneOf,
    checked,
    first_line,
    locked,
    suggest,
)
from ..store import DATA, hub_reachable, read_toml, undo_interrupted_write
from .conversion import converted_folder
from .folder_checks import UnfitFolder
from .loading import (
    SIDECAR,
    add_history,
    load_folder,
    load_pretrained,
    load_tokenizer,
    refuse_quantised,
)
from .merging import ADAPTER, load_adapter
from .model_cards import CARD, origin_from
from .runtime import default_device, origin_of

_ORIGIN = ("title", "note", "licence", "language", "hub")


def registry() -> dict[str, dict]:
    """Models that load by name, from ``data/models.toml``."""
    return read_toml(DATA / "models.toml")


@checked(name_or_path=Location(), dtype=Dtype() | OneOf(["auto"]), device=Device() | None)
def load_model(
    name_or_path: str | os.PathLike,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer.

    Parameters
    ----------
    name_or_path : str or path
        A name of `registry` (``"smollm2-135m"``, ``"tiny-llama"``, …), a Hugging Face hub id, a
        local folder, a saved mini-GPT, or a folder with a LoRA adapter (merged into its base; its
        own tokenizer is used if it has one).
        ``"smollm2-135m"`` is dequantised from a 4-bit (Q4_1) checkpoint of the instruct model.
    dtype : str or torch.dtype
        ``"auto"`` keeps the stored type; otherwise e.g. ``"float32"`` or ``torch.bfloat16``.
    device : str or torch.device, optional
        Where to put the model; by default the best device of the machine.

    Returns
    -------
    model : transformers.PreTrainedModel
        In evaluation mode.
    tokenizer : transformers.PreTrainedTokenizerBase

    Raises
    ------
    FileNotFoundError
        If there is no such model; the message offers the nearest names.
    ValueError
        If a folder is damaged or lacks weights, a hash differs or a weight is not finite.
    """
    with locked(GLOBAL_STATE):
        model, tokenizer = _open(name_or_path, dtype)
    refuse_non_finite(model, str(name_or_path))
    model.to(device or default_device()).eval()
    return model, tokenizer


def _open(name_or_path: str | os.PathLike, dtype: str | torch.dtype, above: tuple = ()) -> tuple:
    """Load a model and its tokenizer to the CPU, from whatever the name refers to.

    If the model is the base of adapters that are being loaded, `above` holds their folders.
    """
    name, folder = str(name_or_path), Path(name_or_path).expanduser()
    # "tiny-opt" may be a name of the registry or the hub, Path("tiny-opt") is always a folder.
    is_path = isinstance(name_or_path, os.PathLike)
    known = {} if is_path else registry()
    if name in known:
        return _load_registered(name, known[name], dtype)
    if undo_interrupted_write(folder).is_dir():
        if (folder / ADAPTER).is_file():
            return load_adapter(folder, above, functools.partial(_open, dtype=dtype))
        model, tokenizer = load_folder(folder, dtype), load_tokenizer(folder)
        title = folder.resolve().name
        _note_origin(model, **{"title": title, **origin_from(folder / CARD)})
        return model, tokenizer
    if is_path or folder.exists() or folder.is_absolute() or name.startswith("."):
        near = suggest(folder.name, sorted(path.name for path in folder.parent.glob("*/")))
        raise FileNotFoundError(
            f"no model {name!r}: there is no such folder with config.json and *.safetensors"
            + (f"; {near}" if near.startswith("did") else "")
        )
    return _load_hub(name, dtype)


def _load_registered(name: str, entry: dict, dtype: str | torch.dtype) -> tuple:
    """Load a model of `registry`, from the package's data or a converted checkpoint."""
    folder = DATA / entry["folder"] if "folder" in entry else converted_folder(name, entry)
    model = load_folder(folder, dtype)
    _note_origin(model, **{key: entry[key] for key in _ORIGIN if key in entry})
    return model, load_tokenizer(folder)


def _load_hub(name: str, dtype: str | torch.dtype) -> tuple:
    """Load a model from the Hugging Face hub, or from its cache if the hub cannot be reached."""
    where = {"local_files_only": not hub_reachable()}
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False, **where)
        refuse_quantised(getattr(config, "quantization_config", None), name)
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, **where)
        model = load_pretrained(name, dtype, **where)
        card, sidecar = (_hub_file(name, file, **where) for file in (CARD, SIDECAR))
        facts = origin_from(card) if card else {}
        _note_origin(model, **{"title": Path(name).name, **facts, "hub": name})
        if sidecar:
            add_history(model, sidecar.parent)
        return model, tokenizer
    except UnfitFolder:
        raise
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"no model {name!r}: not a name of this kit ({suggest(name, list(registry()))}), not a "
            f"local folder, and the hub said: {first_line(error)}"
        ) from error


def _hub_file(name: str, file: str, *, local_files_only: bool) -> Path | None:
    """A file of a model on the hub; None if there is none."""
    try:
        return Path(hf_hub_download(name, file, local_files_only=local_files_only))
    except OSError:
        return None


def _note_origin(model: PreTrainedModel, **facts: str) -> None:
    """Write what is known of a base model into its config, unless a saved model brought that."""
    if facts and not origin_of(model):
        model.config.minigpt_lab_origin = facts


def refuse_non_finite(model: PreTrainedModel, name: str) -> None:
    """Refuse a model with NaN or infinite weights.

    Raises
    ------
    ValueError
        Naming the first, and how many tensors have some.
    """
    bad = [key for key, weight in model.named_parameters() if not torch.isfinite(weight).all()]
    if bad:
        raise ValueError(
            f"model {name!r} has NaN or infinite weights in {bad[0]} ({len(bad)} tensors); "
            "its file is damaged or it diverged in training: use another checkpoint"
        )
