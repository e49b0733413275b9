"""A model out of its folder: whole, as it was saved, or not at all.

What a folder holds is compared with what its config asks for before and after it is read: no weight
is ever made up for one that is missing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
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
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..checks import COMPUTE_DTYPES
from .anatomy import Anatomy
from .layers import add_bias
from .plan import PruningPlan
from .resizing import set_units
from .vocabulary import TrimmedVocabulary
from .weight_files import (
    WRAPPERS,
    UnfitFolder,
    check_config,
    check_fit,
    damaged,
    read_object,
    reading,
    refuse_unfit,
    safetensors_files,
    stored_tensors,
)

SIDECAR = "minigpt_lab.json"
FORMAT = 1
_MOST_TOKENS = 2**24
_MOST_UNITS = 2**20  # of the dense model; of today's largest fewer than 2**17
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def load_folder(folder: Path, dtype: str | torch.dtype) -> PreTrainedModel:
    """The model in a folder, or the mini-GPT that `save_model` left there.

    Raises
    ------
    FileNotFoundError
        If the folder holds no model.
    ValueError
        If it is damaged, or its weights and its config are not of one model.
    """
    if not (folder / "config.json").is_file():
        inside = sorted(path.parent.name for path in folder.glob("*/*config.json"))
        raise FileNotFoundError(
            f"{folder} holds no model: expected config.json and *.safetensors, found "
            f"{sorted(path.name for path in folder.iterdir())[:8] or 'nothing'}"
            + (f"; did you mean its folder {inside[0]}?" if inside else "")
        )
    with reading(folder):
        facts = read_object(folder / "config.json")
        refuse_quantised(facts.get("quantization_config"), folder)
        tensors = stored_tensors(folder)
        check_config(folder, facts, tensors)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        _check_class(folder, config)
        if dtype == "auto" and isinstance(config.dtype, torch.dtype):
            _check_stored_type(folder, config.dtype)
        read = _shrunk if (folder / SIDECAR).is_file() else _plain
        return read(folder, config, tensors, dtype)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a model's folder.

    Raises
    ------
    ValueError
        If there is none, or it is damaged.
    """
    if not has_tokenizer(folder):
        raise UnfitFolder(
            f"{folder} holds no tokenizer: expected tokenizer.json beside the weights; "
            "save the one that the model was trained with there: tokenizer.save_pretrained(folder)"
        )
    with reading(folder):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer of its own."""
    return any((folder / name).is_file() for name in _TOKENIZER)


def load_pretrained(source: str | Path, dtype: str | torch.dtype, **options) -> PreTrainedModel:
    """Transformers' loader; weights that it would make up or leave out are an error.

    Raises
    ------
    ValueError
        Naming them.
    """
    model, found = AutoModelForCausalLM.from_pretrained(
        source,
        dtype=dtype,
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # named below
        **options,
    )
    missing = found["missing_keys"] - model.all_tied_weights_keys.keys()
    refuse_unfit(source, missing, found["unexpected_keys"], found["mismatched_keys"])
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    separate = head is not None and head.weight is not embedding.weight
    return untied(model) if separate and model.config.tie_word_embeddings else model


def untied(model: PreTrainedModel) -> PreTrainedModel:
    """Note that a model's head is not its embedding, so that saving and loading keep both."""
    model.config.tie_word_embeddings = False
    model.all_tied_weights_keys = {}
    return model


def refuse_quantised(settings: object, source: str | Path) -> None:
    """Refuse a model whose config says that its weights are quantised.

    Raises
    ------
    ValueError
        Naming the method, and what to do.
    """
    if settings is None:
        return
    method = settings if isinstance(settings, Mapping) else vars(settings)
    raise UnfitFolder(
        f"{source} is quantised ({method.get('quant_method')}): its layers hold no plain weights "
        "to cut; expected float32, bfloat16 or float16. Load the checkpoint it was made from, or "
        "dequantise it (model.dequantize()) and save that"
    )


def _check_class(folder: Path, config: PretrainedConfig) -> None:
    """Refuse a config whose two names for its architecture contradict each other."""
    classes = set(config.architectures or ()) & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    expected = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    if classes and expected not in classes:
        raise damaged(
            folder,
            f"config.json says model_type {config.model_type!r} and architectures {[*classes]}",
            f"set model_type to that of {min(classes)}, if that is what the weights are of",
        )


def _check_stored_type(folder: Path, dtype: torch.dtype) -> None:
    if dtype not in COMPUTE_DTYPES:
        raise UnfitFolder(
            f"{folder} is stored as {str(dtype).removeprefix('torch.')}; expected float32, "
            "bfloat16, float16 or float64: give dtype='float32', or load what it was made from"
        )


def _plain(
    folder: Path, config: PretrainedConfig, tensors: Mapping, dtype: str | torch.dtype
) -> PreTrainedModel:
    check_fit(folder, _on_meta(config, None), tensors)
    if not any(re.search(WRAPPERS, name) for name in tensors):
        return load_pretrained(folder, dtype)
    stored = (config.dtype or torch.float32) if dtype == "auto" else dtype
    return _filled(_on_meta(config, stored), folder, _unwrapped(tensors), stored)


def _unwrapped(tensors: Mapping) -> dict:
    """By the names that weights have without torch.compile, DDP and the like around the model."""
    return {re.sub(WRAPPERS, "", name): each for name, each in tensors.items()}


def _on_meta(config: PretrainedConfig, dtype: torch.dtype | None) -> PreTrainedModel:
    """What a config describes, without its weights."""
    with torch.device("meta"), no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    model.tie_weights()
    return model


def _shrunk(
    folder: Path, config: PretrainedConfig, tensors: Mapping, dtype: str | torch.dtype
) -> PreTrainedModel:
    """Rebuild a mini-GPT: the config's model, cut to the saved widths, filled with its weights."""
    sidecar = read_object(folder / SIDECAR)
    if sidecar.get("format") != FORMAT:
        raise UnfitFolder(
            f"{folder / SIDECAR}: format {sidecar.get('format')!r}, this version reads {FORMAT}"
        )
    stored = (config.dtype or torch.float32) if dtype == "auto" else dtype
    tensors = _unwrapped(tensors)
    model = _on_meta(config, stored)
    anatomy = Anatomy(model)
    dense = anatomy.layer_widths()
    most = max(max(counts) for counts in dense.values())
    if most > _MOST_UNITS:
        raise damaged(folder, f"config.json asks for layers of {most:,} units")
    widths = _checked_widths(folder, sidecar.get("widths"), dense)
    set_units(anatomy, {site: [[*range(n)] for n in counts] for site, counts in widths.items()})
    for _, name, module in anatomy.linears():
        if module.bias is None and f"{name}.bias" in tensors:
            add_bias(module)
    _filled(model, folder, tensors, stored)
    _check_heads(folder, model)
    plans = sidecar.get("plans")
    if not isinstance(plans, list):
        raise damaged(folder, f"{SIDECAR}: plans is no list")
    model.pruning_plans = [PruningPlan.from_dict(plan) for plan in plans]
    if sidecar.get("vocabulary") is not None:
        model.trimmed_vocabulary = _vocabulary(folder, sidecar["vocabulary"], model)
    return model


def _checked_widths(folder: Path, widths: object, dense: dict) -> dict[str, list[int]]:
    """Units per layer and site, none more than the dense model has."""
    whole = (
        isinstance(widths, dict)
        and widths.keys() == dense.keys()
        and all(
            isinstance(counts, list)
            and len(counts) == len(dense[site])
            and all(
                type(n) is int and 0 < n <= most
                for n, most in zip(counts, dense[site], strict=True)
            )
            for site, counts in widths.items()
        )
    )
    if not whole:
        shapes = {site: f"{counts[:3]}…" for site, counts in dense.items()}
        raise damaged(folder, f"{SIDECAR}: widths are not numbers of at most {shapes}")
    return widths


def _check_state(folder: Path, model: PreTrainedModel, tensors: Mapping) -> None:
    """Refuse files whose tensors are not, in name and shape, those of the rebuilt model."""
    state = {name: [*tensor.shape] for name, tensor in model.state_dict().items()}
    refuse_unfit(
        folder,
        state.keys() - tensors.keys() - model.all_tied_weights_keys.keys(),
        tensors.keys() - state.keys(),
        [
            (name, tensors[name][0], shape)
            for name, shape in state.items()
            if name in tensors and [*tensors[name][0]] != shape
        ],
    )


def _filled(
    model: PreTrainedModel, folder: Path, tensors: Mapping, dtype: torch.dtype
) -> PreTrainedModel:
    """A model on the meta device with its weights, and with what is computed and not stored."""
    _check_state(folder, model, tensors)
    separate = tensors.keys() & model.all_tied_weights_keys.keys()  # a head of its own after all
    state = {}
    for file in safetensors_files(folder):
        for name, tensor in _unwrapped(load_file(file)).items():
            state[name] = tensor.to(dtype if tensor.is_floating_point() else tensor.dtype)
    model.load_state_dict(state, strict=False, assign=True)
    untied(model) if separate else model.tie_weights()
    for tensor in model.state_dict(keep_vars=True).values():
        tensor._is_hf_initialized = True  # what transformers marks the weights of a file with
    for name, buffer in [*model.named_non_persistent_buffers()]:
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner), last, torch.empty_like(buffer, device="cpu"))
    model.initialize_weights()
    if (folder / "generation_config.json").is_file():
        model.generation_config = type(model.generation_config).from_pretrained(folder)
    return model


def _check_heads(folder: Path, model: PreTrainedModel) -> None:
    """Refuse numbers of surviving heads that the dense model does not have."""
    for layer in Anatomy(model).layers:
        heads = getattr(layer, "surviving_heads", None)
        if heads is None:
            continue
        known = set(range(model.config.num_attention_heads))
        if heads.is_floating_point() or not set(heads.tolist()) <= known:
            raise damaged(folder, f"surviving_heads are {heads.tolist()[:8]} of {len(known)}")


def _vocabulary(folder: Path, kept: object, model: PreTrainedModel) -> TrimmedVocabulary:
    """Which tokens a mini-GPT has of those it began with."""
    size, rows = (kept.get("size"), kept.get("rows")) if isinstance(kept, dict) else (None, None)
    length = model.get_input_embeddings().weight.shape[0]
    whole = (
        isinstance(rows, list)
        and len(rows) == length
        and all(type(row) is int for row in [*rows, size])
        and all(a < b for a, b in zip([-1, *rows], [*rows, size], strict=True))
        and size <= _MOST_TOKENS
    )
    if not whole:
        raise damaged(
            folder, f"{SIDECAR}: vocabulary is not {length} ascending rows of a size above them"
        )
    return TrimmedVocabulary(size, tuple(rows), tuple(rows))
