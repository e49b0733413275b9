"""Load a model from its folder: exactly as it was saved, or not at all.

The tensors in a folder are compared with those that its config asks for: a missing weight is an
error, never initialised at random.
"""

from __future__ import annotations

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

from ..architectures import dense_type
from ..checks import DictOf, Dtype, Integer, ListOf, Text
from .anatomy import Anatomy
from .auto_classes import checked_widths, update_class
from .folder_checks import (
    Shapes,
    UnfitFolder,
    check_config,
    check_memory,
    damaged,
    explain_damage,
    read_object,
    refuse_unfit,
    safetensors_files,
    stored_shapes,
)
from .layers import add_bias
from .plan import PruningPlan
from .resizing import set_units
from .vocabulary import TrimmedVocabulary

SIDECAR = "minigpt_lab.json"
FORMAT = 2
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def load_folder(folder: Path, dtype: str | torch.dtype) -> PreTrainedModel:
    """Load the model in a folder, or the mini-GPT that `save_model` wrote there.

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
    with explain_damage(folder):
        entries = read_object(folder / "config.json")
        refuse_quantised(entries.get("quantization_config"), folder)
        if (folder / "generation_config.json").is_file():
            read_object(folder / "generation_config.json")  # transformers passes over a damaged one
        shapes = stored_shapes(folder)
        check_config(folder, entries, shapes)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        _check_class(folder, config)
        if dtype == "auto" and config.dtype is not None:
            dtype = Dtype()("dtype in config.json", config.dtype)
        sidecar = _read_sidecar(folder)
        if "widths" in sidecar:
            model = _load_format_1(folder, config, sidecar["widths"], shapes, dtype)
        else:
            check_memory(folder, _on_meta(config), shapes)
            model = load_pretrained(folder, dtype)
        _check_heads(model)
        _add_history(model, sidecar)
        return model


def add_history(model: PreTrainedModel, folder: Path) -> None:
    """Give a model the plans and the trimmed vocabulary that `save_model` noted in a folder."""
    with explain_damage(folder):
        _add_history(model, _read_sidecar(folder))


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer in a model's folder.

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
    with explain_damage(folder):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer of its own."""
    return any((folder / name).is_file() for name in _TOKENIZER)


def load_pretrained(source: str | Path, dtype: str | torch.dtype, **options) -> PreTrainedModel:
    """Load with transformers; missing, unexpected or misshapen weights are an error.

    Raises
    ------
    ValueError
        Naming them.
    """
    model, info = AutoModelForCausalLM.from_pretrained(
        source,
        dtype=dtype,
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # named below
        **options,
    )
    missing = info["missing_keys"] - model.all_tied_weights_keys.keys()
    refuse_unfit(source, missing, info["unexpected_keys"], info["mismatched_keys"])
    return untie_if_separate(model)


def untie_if_separate(model: PreTrainedModel) -> PreTrainedModel:
    """Set ``tie_word_embeddings=False`` if the head has its own weight, so that both are saved."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    separate = head is not None and head.weight is not embedding.weight
    if separate and model.config.tie_word_embeddings:
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
        "to prune; expected float32, bfloat16 or float16. Load the checkpoint it was made from, or "
        "dequantise it (model.dequantize()) and save that"
    )


def _check_class(folder: Path, config: PretrainedConfig) -> None:
    """Refuse a config whose ``model_type`` and ``architectures`` contradict each other."""
    named = {name.removeprefix("Minigpt") for name in config.architectures or ()}
    classes = named & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    expected = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(dense_type(config.model_type))
    if classes and expected not in classes:
        raise damaged(
            folder,
            f"config.json says model_type {config.model_type!r} and architectures {[*classes]}",
            f"set model_type to that of {min(classes)}, if that is what the weights are of",
        )


def _on_meta(config: PretrainedConfig, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Build the model of a config on the meta device, without memory for its weights."""
    with torch.device("meta"), no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    model.tie_weights()
    return model


def _read_sidecar(folder: Path) -> dict:
    """What `save_model` noted beside a model's weights; empty if it did not write the folder."""
    if not (folder / SIDECAR).is_file():
        return {}
    sidecar = read_object(folder / SIDECAR)
    number = sidecar.get("format")
    if number not in (1, FORMAT) or ("widths" in sidecar) != (number == 1):
        raise UnfitFolder(
            f"{folder / SIDECAR}: format {number!r}, this version reads 1 (with the widths of the "
            f"layers) and {FORMAT} (without)"
        )
    return sidecar


def _check_heads(model: PreTrainedModel) -> None:
    """Refuse indices of kept heads that the dense model does not have (`Family.per_head`)."""
    heads = ListOf(Integer(0, model.config.num_attention_heads - 1)) | None
    for layer in Anatomy(model).layers:
        heads("surviving_heads", getattr(layer, "surviving_heads", None))


def _add_history(model: PreTrainedModel, sidecar: dict) -> None:
    """Give a model its plans and its trimmed vocabulary, as `save_model` noted them."""
    if not sidecar:
        return
    plans = ListOf(DictOf(Text()))(f"{SIDECAR}: plans", sidecar.get("plans"))
    model.pruning_plans = [PruningPlan.from_dict(plan) for plan in plans]
    if sidecar.get("vocabulary") is not None:
        model.trimmed_vocabulary = TrimmedVocabulary.from_dict(sidecar["vocabulary"], model)


def _load_format_1(
    folder: Path, config: PretrainedConfig, widths: object, shapes: Shapes, dtype: str | torch.dtype
) -> PreTrainedModel:
    """Load a folder whose widths are in the sidecar, as it was written before there were classes.

    The config's model is resized to the widths and then given its weights.
    """
    dtype = torch.float32 if dtype == "auto" else dtype
    model = _on_meta(config, dtype)
    anatomy = Anatomy(model)
    counts = checked_widths(widths, anatomy.layer_widths())
    set_units(anatomy, {site: [[*range(n)] for n in layers] for site, layers in counts.items()})
    for _, name, module in anatomy.linears():
        if module.bias is None and f"{name}.bias" in shapes:
            add_bias(module)
    check_memory(folder, model, shapes)
    _fill(model, folder, dtype)
    update_class(anatomy)
    return model


def _fill(model: PreTrainedModel, folder: Path, dtype: torch.dtype) -> None:
    """Load a folder's weights into a model on the meta device, and compute its other buffers."""
    # 1. The parameters and saved buffers; torch refuses those of another shape.
    state = {}
    for file in safetensors_files(folder):
        for name, tensor in load_file(file).items():
            state[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    tied = model.all_tied_weights_keys.keys()
    refuse_unfit(folder, {*missing} - tied, unexpected)
    if state.keys() & tied:  # the file holds a head of its own although the config ties it
        untie_if_separate(model)
    else:
        model.tie_weights()
    # 2. Buffers that are not saved (rotary frequencies): allocated, then computed by transformers,
    #    which leaves alone what is marked as initialised.
    for tensor in model.state_dict(keep_vars=True).values():
        tensor._is_hf_initialized = True
    for name, buffer in [*model.named_non_persistent_buffers()]:
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner), last, torch.empty_like(buffer, device="cpu"))
    model.initialize_weights()
    if (folder / "generation_config.json").is_file():
        model.generation_config = type(model.generation_config).from_pretrained(folder)
