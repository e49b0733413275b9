"""Models out: saved whole, reloaded and compared."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..checks import Flag, Location, Model, Tokenizer, UnusablePath, checked, writable_folder
from ..store import DamagedFile, atomic_write, read_json, write_json
from .anatomy import Anatomy
from .by_name import load_model
from .layers import has_added_bias
from .loading import FORMAT, SIDECAR
from .resizing import config_widths, padding, set_units, update_config
from .runtime import inference, settings_saved_as_they_are
from .vocabulary import tokenizer_for


@checked(model=Model(), tokenizer=Tokenizer(), path=Location(), portable=Flag())
@torch.no_grad()
def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    path: str | os.PathLike,
    *,
    portable: bool = False,
) -> Path:
    """Save a model so that it reloads, here or with plain transformers.

    The folder is written beside its final place, reloaded, compared (logits of a fixed probe, bit
    for bit) and only then renamed. Widths that are uniform and have a field in the architecture's
    config load with plain ``AutoModelForCausalLM.from_pretrained``; others load with `load_model`.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Dense, masked or shrunk.
    tokenizer : transformers.PreTrainedTokenizerBase
        The model's tokenizer; for a model with a trimmed vocabulary the original one may be given,
        and the trimmed one is saved.
    path : str or path
        Folder to create. One that is empty or that an earlier call wrote is replaced, but for
        files that it did not write; any other is refused.
    portable : bool
        Pad layers with units of zeros to the widest (to the dense width where the config has no
        field for it), so that plain transformers loads the folder at the price of a larger file.
        It has no place for biases that bias compensation gave to layers without one: it would warn
        of them and leave them out.

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
    if final.is_dir() and any(final.iterdir()) and not _is_saved(final):
        raise FileExistsError(
            f"{final} exists and was not written by save_model; choose another folder"
        )
    kept = getattr(model, "trimmed_vocabulary", None)
    if kept is not None and kept.rows != kept.allowed:
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
    with atomic_write(final, _written) as staging:
        # names as in memory: a layer's own widths leave no loader but ours, which knows no others
        with settings_saved_as_they_are(stored):
            stored.save_pretrained(staging, max_shard_size="1TB", save_original_format=False)
        tokenizer_for(model, tokenizer).save_pretrained(staging)
        sidecar = {
            "format": FORMAT,
            "widths": Anatomy(stored).layer_widths(),
            "plans": [plan.to_dict() for plan in getattr(model, "pruning_plans", [])],
            "vocabulary": kept and {"size": kept.size, "rows": kept.rows},
            "files": sorted(path.name for path in staging.iterdir()),
        }
        write_json(staging / SIDECAR, sidecar)
        _compare_reloaded(stored, staging)
    return final


def _is_saved(folder: Path) -> bool:
    """Whether `save_model` wrote a folder: it has our sidecar, which may be damaged."""
    try:
        return "widths" in _sidecar(folder)
    except (FileNotFoundError, UnusablePath):
        return False
    except DamagedFile:
        return True


def _written(folder: Path) -> set[str]:
    """Names of the files in a folder that `save_model` wrote, as far as it says."""
    try:
        found = _sidecar(folder).get("files", [])
    except (OSError, DamagedFile):
        found = []
    return {SIDECAR, *(name for name in found if isinstance(name, str))}


def _sidecar(folder: Path) -> dict:
    found = read_json(folder / SIDECAR)
    return found if isinstance(found, dict) else {}


def _padded(model: PreTrainedModel) -> PreTrainedModel:
    """A copy with layers of one width: the widest, or the dense one where no config says less."""
    model = copy.deepcopy(model)
    anatomy = Anatomy(model)
    for site, counts in anatomy.layer_widths().items():
        _pad(anatomy, site, [max(counts)] * len(counts))
    update_config(anatomy)
    for site, counts in config_widths(anatomy).items():
        _pad(anatomy, site, counts)
    return model


def _pad(anatomy: Anatomy, site: str, widths: list[int]) -> None:
    units = [padding(anatomy, site, layer, width) for layer, width in enumerate(widths)]
    set_units(anatomy, {site: units})


def _compare_reloaded(model: PreTrainedModel, folder: Path) -> None:
    reloaded, _ = load_model(folder, device=model.device)
    reloaded.set_attn_implementation(model.config._attn_implementation)
    # Buffers outside the state (rotary frequencies) are not saved but computed anew; a model cast
    # to bfloat16 has them rounded, which is no fault of the file.
    for (name, ours), (_, theirs) in zip(
        model.named_buffers(), reloaded.named_buffers(), strict=True
    ):
        owner, _, last = name.rpartition(".")
        setattr(reloaded.get_submodule(owner), last, ours.to(theirs.device))
    rows = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    probe = torch.randint(rows, (2, 16), generator=generator).to(model.device)
    with inference(model), inference(reloaded):
        before, after = (m(input_ids=probe, use_cache=False).logits for m in (model, reloaded))
    if not torch.equal(before, after):
        gap = (before - after).abs().max().item()
        raise RuntimeError(f"the saved model differs from the one in memory (logits by {gap:.3g})")
