"""Save a model: write it to a temporary folder, reload and compare it, then rename the folder."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..architectures import dense_type, pruned_type
from ..checks import (
    Flag,
    Instance,
    Location,
    Model,
    Tokenizer,
    UnusablePath,
    checked,
    safe_contextmanager,
    writable_folder,
)
from ..store import DamagedFile, atomic_write, read_json, write_json
from .anatomy import Anatomy
from .auto_classes import config_widths, dense_classes, update_config
from .by_name import load_model
from .layers import has_added_bias
from .loading import FORMAT, SIDECAR
from .model_cards import CARD, is_users, model_card
from .remote_code import FILE, auto_map, modelling_code
from .resizing import padding, set_units
from .runtime import inference, quiet
from .vocabulary import tokenizer_for


@checked(
    model=Model(),
    tokenizer=Tokenizer(),
    path=Location(),
    portable=Flag(),
    remote_code=Flag(),
    card=Instance(ModelCard, "lab.model_card(model) makes one") | None,
)
@torch.no_grad()
def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    path: str | os.PathLike,
    *,
    portable: bool = False,
    remote_code: bool = False,
    card: ModelCard | None = None,
) -> Path:
    """Save a model so that it reloads, here or with transformers.

    The model is written to a temporary folder beside `path`, reloaded and compared (logits of fixed
    token ids, bit for bit); only then the folder is renamed. If all layers have one width and the
    architecture's config has a field for it, the folder loads with
    ``AutoModelForCausalLM.from_pretrained`` anywhere; otherwise it does after
    ``import minigpt_lab``.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Dense, masked or shrunk.
    tokenizer : transformers.PreTrainedTokenizerBase
        The model's tokenizer; for a model with a trimmed vocabulary the original one may be given,
        and the trimmed one is saved.
    path : str or path
        Folder to create. An empty folder is used. In a folder of an earlier call, the files that it
        wrote are replaced and others are left. Any other folder is refused.
    portable : bool
        Pad layers with units of zeros to the widest (to the dense width where the config has no
        field for it), so that transformers loads the folder without this package, at the price of a
        larger file. Not possible if bias compensation added biases that the architecture lacks:
        plain transformers would drop them.
    remote_code : bool
        Also write ``modeling_minigpt.py``, with which
        ``AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`` loads layers of
        different widths without this package. This package never reads it.
    card : huggingface_hub.ModelCard, optional
        Written as ``README.md``; by default that of `model_card` without measured losses. A
        ``README.md`` that is there and was not written by this package is left.

    Returns
    -------
    pathlib.Path
        The folder.

    Raises
    ------
    FileExistsError
        If `path` holds something that this function did not write.
    ValueError
        If the model is masked and the mask forbids tokens, or `portable` cannot be.
    OSError
        If the folder cannot be written: what was there before is left.
    RuntimeError
        If the reloaded model gives other logits.
    """
    final = writable_folder(path)
    if final.is_dir() and any(final.iterdir()) and _written_files(final) is None:
        raise FileExistsError(
            f"{final} exists and was not written by save_model; choose another folder"
        )
    vocabulary = getattr(model, "trimmed_vocabulary", None)
    if vocabulary is not None and vocabulary.rows != vocabulary.allowed:
        raise ValueError(
            "a mask over the vocabulary cannot be saved: its tokens are forbidden, not gone; "
            "shrink the model and save that"
        )
    if portable and has_added_bias(model):
        raise ValueError(
            "bias compensation gave this model biases that its architecture lacks, so plain "
            "transformers cannot load it whole; save it without portable=True"
        )
    stored = _padded(model) if portable else model
    with atomic_write(final, lambda folder: _written_files(folder) or set()) as staging:
        with _original_generation_config(stored), quiet():
            # Weights keep their names in memory.
            stored.save_pretrained(staging, max_shard_size="1TB", save_original_format=False)
        tokenizer_for(model, tokenizer).save_pretrained(staging)
        if remote_code and stored.config.model_type == pruned_type(stored.config.model_type):
            _add_remote_code(staging, stored)
        if not is_users(final / CARD):
            (staging / CARD).write_text(str(card or model_card(stored)), encoding="utf-8")
        sidecar = {
            "format": FORMAT,
            "plans": [plan.to_dict() for plan in getattr(model, "pruning_plans", [])],
            "vocabulary": vocabulary and {"size": vocabulary.size, "rows": vocabulary.rows},
            "files": sorted(path.name for path in staging.iterdir()),
        }
        write_json(staging / SIDECAR, sidecar)
        _compare_reloaded(stored, staging)
    return final


def _add_remote_code(folder: Path, model: PreTrainedModel) -> None:
    """Write the modelling file, and name its classes in ``config.json``."""
    classes = dense_classes(model.config.model_type)
    text = modelling_code(dense_type(model.config.model_type), *classes)
    (folder / FILE).write_text(text, encoding="utf-8")
    entries: Any = read_json(folder / "config.json")
    write_json(folder / "config.json", {**entries, "auto_map": auto_map(*classes)})


def _written_files(folder: Path) -> set[str] | None:
    """Names of the files that an earlier `save_model` wrote into a folder; None if it wrote none.

    If the sidecar that lists them is damaged, only its own name is known.
    """
    try:
        sidecar = read_json(folder / SIDECAR)
    except (FileNotFoundError, UnusablePath):
        return None
    except DamagedFile:
        return {SIDECAR}
    if not isinstance(sidecar, dict) or "plans" not in sidecar:
        return None
    names = {SIDECAR, *(name for name in sidecar.get("files", []) if isinstance(name, str))}
    return names - {CARD} if is_users(folder / CARD) else names


@safe_contextmanager
def _original_generation_config(model: PreTrainedModel) -> Iterator[None]:
    """Let transformers save generation settings that it refuses, such as an unused temperature.

    It refuses invalid settings only if they were changed since loading, as a trimmed vocabulary
    does by renumbering special tokens. So a copy of the settings is marked as original inside the
    block.
    """
    settings = getattr(model, "generation_config", None)
    if settings is not None:
        model.generation_config = copy.deepcopy(settings)
        model.generation_config._original_object_hash = hash(settings)
    try:
        yield
    finally:
        if settings is not None:
            model.generation_config = settings


def _padded(model: PreTrainedModel) -> PreTrainedModel:
    """Copy a model with its layers padded to one width that the config can hold."""
    model = copy.deepcopy(model)
    anatomy = Anatomy(model)
    # 1. To the widest layer; then the config gets that width if it has a field for it.
    for site, counts in anatomy.layer_widths().items():
        _pad(anatomy, site, [max(counts)] * len(counts))
    update_config(anatomy)
    # 2. To the width that the config describes, which is the dense one if it has no field.
    for site, counts in config_widths(anatomy).items():
        _pad(anatomy, site, counts)
    update_config(anatomy)
    return model


def _pad(anatomy: Anatomy, site: str, widths: list[int]) -> None:
    """Pad the layers of a site with units of zeros to some widths, in place."""
    units = [padding(anatomy, site, layer, width) for layer, width in enumerate(widths)]
    set_units(anatomy, {site: units})


def _compare_reloaded(model: PreTrainedModel, folder: Path) -> None:
    """Refuse a folder whose model gives other logits, on a fixed probe, than the one in memory."""
    with quiet():  # a bar would look as if a reader's own load ran twice
        reloaded, _ = load_model(folder, device=model.device)
    reloaded.set_attn_implementation(model.config._attn_implementation)
    # Rotary frequencies and the like are not saved but computed anew; a model cast to bfloat16 has
    # them rounded, which is no fault of the file.
    for name, buffer in model.named_non_persistent_buffers():
        owner, _, last = name.rpartition(".")
        setattr(reloaded.get_submodule(owner), last, buffer)
    rows = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    probe = torch.randint(rows, (2, 16), generator=generator).to(model.device)
    with inference(model), inference(reloaded):
        before, after = (m(input_ids=probe, use_cache=False).logits for m in (model, reloaded))
    if not torch.equal(before, after):
        gap = (before - after).abs().max().item()
        raise RuntimeError(f"the saved model differs from the one in memory (logits by {gap:.3g})")
