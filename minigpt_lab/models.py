"""Models by name: the embedded ones, the hub, a local folder, a saved mini-GPT.

A saved mini-GPT is an ordinary Hugging Face folder with one file more, ``minigpt_lab.json``: the
units of every layer and the plan they came from. Sizes per architecture are data, not code.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.initialization import no_init_weights

from .assets import DATA, first_line, hub_in_reach, nearest, read_toml
from .biases import give_bias
from .conversion import converted
from .families import Anatomy, weight_axis
from .plan import PruningPlan
from .runtime import default_device
from .storage import settled
from .vocabulary import TrimmedVocabulary

SIDECAR = "minigpt_lab.json"
FORMAT = 1


def registry() -> dict[str, dict]:
    """Models that load by name, from ``data/models.toml``."""
    return read_toml(DATA / "models.toml")


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
        local folder, a saved mini-GPT, or a folder with a LoRA adapter (merged into its base).
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
        If a folder is damaged, a hash differs or a weight is not finite.
    """
    name = str(name_or_path)
    if isinstance(dtype, str) and dtype != "auto":
        if not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise ValueError(
                f"unknown dtype {dtype!r}; use 'auto', 'float32', 'bfloat16' or 'float16'"
            )
        dtype = getattr(torch, dtype)
    # "tiny-opt" is a name of the kit, Path("tiny-opt") a folder
    entry = None if isinstance(name_or_path, os.PathLike) else registry().get(name)
    if entry is not None:
        folder = DATA / entry["folder"] if "folder" in entry else converted(name, entry)
        model, tokenizer = _load_folder(folder, dtype)
    elif settled(Path(name)).is_dir():
        model, tokenizer = _load_folder(Path(name), dtype)
    else:
        model, tokenizer = _load_hub(name, dtype)
    _refuse_non_finite(model, name)
    if entry is not None:
        model.config.minigpt_lab_origin = {
            field: entry[field] for field in ("title", "note", "licence")
        }
    model.to(device or default_device()).eval()
    return model, tokenizer


def _load_folder(folder: Path, dtype: str | torch.dtype) -> tuple:
    if (folder / "adapter_config.json").is_file():
        return _load_adapter(folder, dtype)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{folder} holds no model: expected config.json and *.safetensors, found "
            f"{sorted(path.name for path in folder.iterdir())[:8] or 'nothing'}"
        )
    try:
        _refuse_quantised(AutoConfig.from_pretrained(folder, trust_remote_code=False), folder)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        if not (folder / SIDECAR).is_file():
            return _pretrained(folder, dtype), tokenizer
        return _load_shrunk(folder, dtype), tokenizer
    except (SafetensorError, json.JSONDecodeError, LookupError, RuntimeError, OSError) as error:
        raise ValueError(
            f"{folder} is damaged or incomplete ({first_line(error)}); save it again"
        ) from error


def _pretrained(source: str | Path, dtype: str | torch.dtype, **options) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(
        source, dtype=dtype, use_safetensors=True, trust_remote_code=False, **options
    )


def _load_hub(name: str, dtype: str | torch.dtype) -> tuple:
    where = {"local_files_only": not hub_in_reach()}
    with _hub_errors(name):
        config = AutoConfig.from_pretrained(name, trust_remote_code=False, **where)
    _refuse_quantised(config, name)
    with _hub_errors(name):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, **where)
        return _pretrained(name, dtype, **where), tokenizer


@contextlib.contextmanager
def _hub_errors(name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"no model {name!r}: not a name of this kit ({nearest(name, list(registry()))}), not a "
            f"local folder, and the hub said: {first_line(error)}"
        ) from error


def _refuse_quantised(config: PretrainedConfig, source: str | Path) -> None:
    found = getattr(config, "quantization_config", None)
    if found is not None:
        method = found.get("quant_method") if isinstance(found, dict) else found.quant_method
        raise ValueError(
            f"{source} is quantised ({method}): its layers hold no plain weights to cut; expected "
            "float32, bfloat16 or float16. Load the checkpoint it was made from, or dequantise it "
            "(model.dequantize()) and save that"
        )


def _load_adapter(folder: Path, dtype: str | torch.dtype) -> tuple:
    """A LoRA adapter's folder: load the base it names and merge the adapter into it."""
    from peft import PeftConfig, PeftModel

    name = PeftConfig.from_pretrained(folder).base_model_name_or_path
    if not name:
        raise ValueError(
            f"the adapter in {folder} names no base model; write its name or folder into "
            "adapter_config.json, as base_model_name_or_path"
        )
    base, tokenizer = load_model(name, dtype, "cpu")
    _check_adapter(folder, base, name)
    return PeftModel.from_pretrained(base, folder).merge_and_unload(), tokenizer


def _check_adapter(folder: Path, base: PreTrainedModel, name: str) -> None:
    """Refuse an adapter of another shape; peft passes over one whose layer is gone."""
    try:
        factors = load_file(folder / "adapter_model.safetensors")
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{folder} is damaged or incomplete ({first_line(error)}); save it again"
        ) from error
    modules = dict(base.named_modules())
    for key, factor in factors.items():
        layer, _, which = key.removeprefix("base_model.model.").partition(".lora_")
        axis, side = {"A.weight": (1, "input"), "B.weight": (0, "output")}.get(which, (0, None))
        if side is None:
            continue  # of an embedding, or no LoRA: peft's own checks must do
        module = modules.get(layer)
        here = module and module.weight.shape[weight_axis(module, side)]
        if here != factor.shape[axis]:
            what = f"{here} {side}s of {layer}" if module else f"no {layer}"
            raise ValueError(
                f"the adapter in {folder} does not fit its base {name!r}, which has {what}; the "
                f"adapter was trained on {factor.shape[axis]}. If the base was pruned since, merge "
                "the adapter into the base from before, and prune that"
            )


def _load_shrunk(folder: Path, dtype: str | torch.dtype) -> PreTrainedModel:
    """Rebuild a mini-GPT: the config's model, cut to the saved widths, filled with its weights."""
    sidecar = json.loads((folder / SIDECAR).read_text(encoding="utf-8"))
    if sidecar.get("format") != FORMAT:
        raise ValueError(
            f"{folder / SIDECAR}: format {sidecar.get('format')!r}, this version reads {FORMAT}"
        )
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    stored = config.dtype if dtype == "auto" else dtype
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=stored, trust_remote_code=False)
    widths = sidecar["widths"].items()
    Anatomy(model).set_units({site: [list(range(n)) for n in counts] for site, counts in widths})
    state = load_file(folder / "model.safetensors")
    for _, name, module in Anatomy(model).linears():
        if module.bias is None and f"{name}.bias" in state:
            give_bias(module)
    missing, unexpected = model.load_state_dict(state, strict=False)
    absent = set(missing) - set(model.all_tied_weights_keys)
    if absent or unexpected:
        raise KeyError(f"weights do not match: missing {sorted(absent)}, unexpected {unexpected}")
    model.tie_weights()
    model.pruning_plans = [PruningPlan.from_dict(plan) for plan in sidecar["plans"]]
    if sidecar["vocabulary"] is not None:
        kept = sidecar["vocabulary"]
        model.trimmed_vocabulary = TrimmedVocabulary(kept["size"], *[tuple(kept["rows"])] * 2)
    if (folder / "generation_config.json").is_file():
        model.generation_config = type(model.generation_config).from_pretrained(folder)
    return model


def _refuse_non_finite(model: PreTrainedModel, name: str) -> None:
    bad = [key for key, weight in model.named_parameters() if not torch.isfinite(weight).all()]
    if bad:
        raise ValueError(
            f"model {name!r} has NaN or infinite weights in {bad[0]} ({len(bad)} tensors); "
            "its file is damaged or it diverged in training: use another checkpoint"
        )
