"""Adapters: a folder that names its base model, merged into it so that nothing else changes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .anatomy import weight_axis
from .loading import has_tokenizer, load_tokenizer, untied
from .weight_files import UnfitFolder, damaged, listed, read_object, reading

ADAPTER = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_RANKS = ("r", "init_r", "target_r", "num_virtual_tokens", "token_dim", "encoder_hidden_size")


def load_adapter(
    folder: Path,
    above: tuple[Path, ...],
    open_base: Callable[..., tuple[PreTrainedModel, PreTrainedTokenizerBase]],
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base model of an adapter with the adapter merged, and the tokenizer they work with.

    Parameters
    ----------
    folder : pathlib.Path
        With ``adapter_config.json``.
    above : tuple of pathlib.Path
        Adapters whose base this one is.
    open_base : callable
        Loads a base by its name or folder.

    Raises
    ------
    ValueError
        If the adapter does not fit its base, is its own, or cannot be merged as peft applies it.
    """
    above = (*above, folder.resolve())
    facts = read_object(folder / ADAPTER)
    name = facts.get("base_model_name_or_path")
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
    if facts.get("megatron_config"):
        raise UnfitFolder(
            f"the adapter in {folder} is for Megatron layers, which are not read here"
        )
    base, tokenizer = open_base(name, above=above)
    if has_tokenizer(folder):
        tokenizer = load_tokenizer(folder)
    with reading(folder):
        shapes = _shapes(folder)
        _check_ranks(folder, facts, shapes)
        _give_rows(base, shapes)
        _check_layers(folder, base, name, shapes)
        return _merged(folder, base, shapes), tokenizer


def _shapes(folder: Path) -> dict[str, list[int]]:
    if not (folder / _WEIGHTS).is_file():
        raise damaged(folder, f"it holds no {_WEIGHTS}; pickled weights are never opened")
    with safe_open(folder / _WEIGHTS, framework="pt") as opened:
        return {
            name.removeprefix("base_model.model."): opened.get_slice(name).get_shape()
            for name in opened.keys()  # noqa: SIM118 (no mapping)
        }


def _check_ranks(folder: Path, facts: dict, shapes: dict[str, list[int]]) -> None:
    """Refuse sizes that the adapter's weights do not have, before peft makes tensors of them."""
    longest = max((max(shape, default=0) for shape in shapes.values()), default=0)
    patterns = facts.get("rank_pattern") or {}
    sizes = {name: facts.get(name) for name in _RANKS} | dict(patterns)
    for name, size in sizes.items():
        if isinstance(size, int | float) and not size <= longest:
            raise damaged(
                folder, f"{ADAPTER}: {name} is {size}, its weights have at most {longest}"
            )


def _give_rows(base: PreTrainedModel, shapes: dict[str, list[int]]) -> None:
    """As many token rows as the adapter brings an embedding or a head for."""
    modules = {id(module): name for name, module in base.named_modules()}
    embedding = base.get_input_embeddings()
    for module in (embedding, base.get_output_embeddings()):
        shape = shapes.get(f"{modules.get(id(module))}.weight")
        if shape is not None and shape[0] > embedding.weight.shape[0]:
            base.resize_token_embeddings(shape[0], mean_resizing=False)


def _check_layers(
    folder: Path, base: PreTrainedModel, name: str, shapes: dict[str, list[int]]
) -> None:
    """Refuse an adapter of another shape; peft passes over one whose layer is gone."""
    modules = dict(base.named_modules())
    for key, shape in shapes.items():
        layer, _, which = key.partition(".lora_")
        axis, side = {"A.weight": (1, "input"), "B.weight": (0, "output")}.get(which, (0, None))
        if side is None:
            continue  # of an embedding, or no LoRA: the names are compared later
        module = modules.get(layer)
        here = module and module.weight.shape[weight_axis(module, side)]
        if here != shape[axis]:
            what = f"{here} {side}s of {layer}" if module else f"no {layer}"
            raise UnfitFolder(
                f"the adapter in {folder} does not fit its base {name!r}, which has {what}; the "
                f"adapter was trained on {shape[axis]}. If the base was pruned since, merge "
                "the adapter into the base from before, and prune that"
            )


@torch.no_grad()
def _merged(folder: Path, base: PreTrainedModel, shapes: dict[str, list[int]]) -> PreTrainedModel:
    """The base with the adapter's changes in its weights; its logits are those of peft."""
    from peft import PeftModel, get_peft_model_state_dict

    tables = [f"{name}." for name, module in base.named_modules() if _is_table(base, module)]
    with warnings.catch_warnings():  # what peft warns of is refused here
        warnings.simplefilter("ignore")
        adapted = PeftModel.from_pretrained(base, folder).eval()
    if not hasattr(adapted, "merge_and_unload"):
        kind = adapted.active_peft_config.peft_type.value
        raise UnfitFolder(
            f"the adapter in {folder} is of type {kind}, which changes no weights and so cannot be "
            "merged; expected LoRA"
        )
    known = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    wanted = {name.removeprefix("base_model.model.") for name in known}
    extra = [n for n in shapes.keys() - wanted if not n.startswith(tuple(tables))]
    for odd, words in (
        (wanted - shapes.keys(), "lacks"),
        (extra, "has, for no layer of its base,"),
    ):
        if odd:
            raise damaged(folder, f"the adapter {words} {len(odd)} weights: {listed(sorted(odd))}")
    probe = _probe(adapted)
    expected = adapted(input_ids=probe, use_cache=False).logits
    _separate_tables(adapted)
    model = adapted.merge_and_unload()
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and head.weight is not embedding.weight:
        untied(model)
    found = model.eval()(input_ids=probe, use_cache=False).logits
    share = 1e-3 if expected.dtype in (torch.float32, torch.float64) else 0.05
    if (found - expected).abs().max() > share * expected.abs().max():  # not of NaN: refused later
        raise UnfitFolder(
            f"the adapter in {folder} cannot be merged into its base: the logits would differ; "
            "merge it with peft and save the result"
        )
    return model.requires_grad_(True)


def _is_table(base: PreTrainedModel, module: nn.Module) -> bool:
    return module in (base.get_input_embeddings(), base.get_output_embeddings())


def _probe(adapted: nn.Module) -> torch.Tensor:
    """Two sequences of token ids, with those in them whose rows the adapter trains."""
    rows = adapted.get_base_model().config.vocab_size
    ids = torch.randint(rows, (2, 16), generator=torch.Generator().manual_seed(0))
    trained = getattr(adapted.active_peft_config, "trainable_token_indices", None) or []
    chosen = trained if isinstance(trained, list) else next(iter(trained.values()))
    for place, token in enumerate(chosen[:16]):
        ids[0, place] = token
    return ids


def _separate_tables(adapted: nn.Module) -> None:
    """A head of its own where the embedding that it shares its weight with, or it, is adapted.

    Merging changes weights in place: a change of one must not be one of the other.
    """
    model = adapted.get_base_model()
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    layers = [layer for layer in (head, embedding) if hasattr(layer, "lora_A")]
    if layers and head.weight is embedding.weight:
        inner = head.get_base_layer() if hasattr(head, "get_base_layer") else head
        inner.weight = nn.Parameter(inner.weight.detach().clone())
