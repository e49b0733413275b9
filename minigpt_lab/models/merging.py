"""Load an adapter: its base model with the adapter merged into the weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .folder_checks import (
    Shapes,
    UnfitFolder,
    explain_damage,
    read_object,
    read_shapes,
    refuse_unfit,
)
from .loading import has_tokenizer, load_tokenizer, untie_if_separate

ADAPTER = "adapter_config.json"


def load_adapter(
    folder: Path,
    above: tuple[Path, ...],
    open_base: Callable[..., tuple[PreTrainedModel, PreTrainedTokenizerBase]],
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load an adapter's base model with the adapter merged, and the tokenizer of both.

    Parameters
    ----------
    folder : pathlib.Path
        The adapter's folder, with ``adapter_config.json``.
    above : tuple of pathlib.Path
        Folders of adapters that have this adapter as their base.
    open_base : callable
        Loads a base by its name or folder.

    Raises
    ------
    ValueError
        If the adapter does not fit its base, is its own base, or cannot be merged.
    """
    above = (*above, folder.resolve())
    with explain_damage(folder):
        config = read_object(folder / ADAPTER)
        name = _base_name(folder, config, above)
    base, tokenizer = open_base(name, above=above)
    if has_tokenizer(folder):
        tokenizer = load_tokenizer(folder)
    remedy = (
        f"if its base {name!r} was changed since (pruned, say), merge the adapter into the base "
        "from before with peft, and load that"
    )
    with explain_damage(folder, remedy):
        shapes = {
            name.removeprefix("base_model.model."): shape
            for name, shape in read_shapes(folder / "adapter_model.safetensors").items()
        }
        _grow_vocabulary(base, shapes)
        adapted = _adapted(folder, base, shapes)
        _separate_tables(adapted)
        merged = untie_if_separate(adapted.merge_and_unload())
        return merged.eval().requires_grad_(True), tokenizer


def _base_name(folder: Path, config: Mapping, above: tuple[Path, ...]) -> str:
    """Name or folder of an adapter's base; refuse one that is an adapter of `above`."""
    name = config.get("base_model_name_or_path")
    if not name or not isinstance(name, str):
        raise UnfitFolder(
            f"the adapter in {folder} names no base model; write its name or folder into "
            f"{ADAPTER}, as base_model_name_or_path"
        )
    if Path(name).expanduser().resolve() in above:
        raise UnfitFolder(
            f"the adapter in {folder} is, through base_model_name_or_path {name!r}, its own base; "
            "write the name or folder of the model it was trained on there"
        )
    if config.get("megatron_config"):  # it names a module that peft would import
        raise UnfitFolder(
            f"the adapter in {folder} is for Megatron layers, which are not read here"
        )
    return name


def _grow_vocabulary(base: PreTrainedModel, shapes: Shapes) -> None:
    """Give the base's vocabulary as many rows as an embedding or a head in the adapter has."""
    names = {module: name for name, module in base.named_modules()}
    embedding = base.get_input_embeddings()
    for table in (embedding, base.get_output_embeddings()):
        rows, *_ = shapes.get(f"{names.get(table)}.weight", [0])
        if rows > embedding.weight.shape[0]:
            base.resize_token_embeddings(rows, mean_resizing=False)


def _adapted(folder: Path, base: PreTrainedModel, shapes: Shapes) -> nn.Module:
    """Apply the adapter by peft; refuse it if a weight is missing or belongs to no layer."""
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict

    settings = PeftConfig.from_pretrained(str(folder))
    if settings.is_prompt_learning:
        raise UnfitFolder(
            f"the adapter in {folder} is of type {settings.peft_type}, which changes no weights "
            "and so cannot be merged; expected LoRA"
        )
    tables = {base.get_input_embeddings(), base.get_output_embeddings()}
    prefixes = tuple(f"{name}." for name, module in base.named_modules() if module in tables)
    with warnings.catch_warnings():  # what peft warns of is an error below
        warnings.simplefilter("ignore")
        # on the meta device first: sizes in a JSON file are not trusted
        adapted = PeftModel.from_pretrained(base, folder, low_cpu_mem_usage=True).eval()
    state = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    wanted = {name.removeprefix("base_model.model.") for name in state}
    extra = [name for name in shapes.keys() - wanted if not name.startswith(prefixes)]
    refuse_unfit(folder, wanted - shapes.keys(), extra)
    return adapted


def _separate_tables(adapted: nn.Module) -> None:
    """Untie embedding and head if one is adapted: merging in place would change the other too."""
    model = adapted.get_base_model()
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not embedding.weight:
        return
    if hasattr(head, "lora_A") or hasattr(embedding, "lora_A"):
        linear = head.get_base_layer() if hasattr(head, "get_base_layer") else head
        linear.weight = nn.Parameter(linear.weight.detach().clone())
