"""Load an adapter: its base model with the adapter merged into the weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .anatomy import weight_axis
from .folder_checks import UnfitFolder, damaged, listed, read_object, reading
from .loading import has_tokenizer, load_tokenizer, untie_if_separate

ADAPTER = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_SIZES = ("r", "init_r", "target_r", "num_virtual_tokens", "token_dim", "encoder_hidden_size")
Shapes = Mapping[str, list[int]]  # of the adapter's weights, by name


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
        If the adapter does not fit its base, is its own base, or changes the logits by merging.
    """
    above = (*above, folder.resolve())
    with reading(folder):
        config = read_object(folder / ADAPTER)
        name = _base_name(folder, config, above)
    base, tokenizer = open_base(name, above=above)
    if has_tokenizer(folder):
        tokenizer = load_tokenizer(folder)
    with reading(folder):
        shapes = _read_shapes(folder)
        _check_sizes(folder, config, shapes)
        _grow_vocabulary(base, shapes)
        _check_layers(folder, base, name, shapes)
        adapted = _adapted(folder, base, shapes)
        return _merge(folder, adapted), tokenizer


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


def _read_shapes(folder: Path) -> Shapes:
    """Shapes of an adapter's weights, from the header of their file."""
    if not (folder / _WEIGHTS).is_file():
        raise damaged(folder, f"it holds no {_WEIGHTS}; pickled weights are never opened")
    with safe_open(folder / _WEIGHTS, framework="pt") as opened:
        return {
            name.removeprefix("base_model.model."): opened.get_slice(name).get_shape()
            for name in opened.keys()  # noqa: SIM118 (no mapping)
        }


def _check_sizes(folder: Path, config: Mapping, shapes: Shapes) -> None:
    """Refuse sizes in the config that no weight has, before peft allocates tensors for them."""
    longest = max((max(shape, default=0) for shape in shapes.values()), default=0)
    sizes = {name: config.get(name) for name in _SIZES} | dict(config.get("rank_pattern") or {})
    for name, size in sizes.items():
        if isinstance(size, int | float) and not size <= longest:
            why = f"{ADAPTER}: {name} is {size}, its weights have at most {longest}"
            raise damaged(folder, why)


def _grow_vocabulary(base: PreTrainedModel, shapes: Shapes) -> None:
    """Give the base's vocabulary as many rows as an embedding or a head in the adapter has."""
    names = {module: name for name, module in base.named_modules()}
    embedding = base.get_input_embeddings()
    for table in (embedding, base.get_output_embeddings()):
        rows, *_ = shapes.get(f"{names.get(table)}.weight", [0])
        if rows > embedding.weight.shape[0]:
            base.resize_token_embeddings(rows, mean_resizing=False)


def _check_layers(folder: Path, base: PreTrainedModel, name: str, shapes: Shapes) -> None:
    """Refuse LoRA factors that do not fit the base's layers; peft would skip a missing layer."""
    modules = dict(base.named_modules())
    for key, shape in shapes.items():
        layer, _, factor = key.partition(".lora_")
        axis, side = {"A.weight": (1, "input"), "B.weight": (0, "output")}.get(factor, (0, None))
        if side is None:
            continue  # an embedding's factor, or no LoRA: `_adapted` compares the names
        module = modules.get(layer)
        width = module and module.weight.shape[weight_axis(module, side)]
        if width != shape[axis]:
            what = f"{width} {side}s of {layer}" if module else f"no {layer}"
            raise UnfitFolder(
                f"the adapter in {folder} does not fit its base {name!r}, which has {what}; the "
                f"adapter was trained on {shape[axis]}. If the base was pruned since, merge "
                "the adapter into the base from before, and prune that"
            )


def _adapted(folder: Path, base: PreTrainedModel, shapes: Shapes) -> nn.Module:
    """Apply the adapter by peft; refuse it if a weight is missing or belongs to no layer."""
    from peft import PeftModel, get_peft_model_state_dict

    tables = {base.get_input_embeddings(), base.get_output_embeddings()}
    prefixes = tuple(f"{name}." for name, module in base.named_modules() if module in tables)
    with warnings.catch_warnings():  # what peft warns of is an error below
        warnings.simplefilter("ignore")
        adapted = PeftModel.from_pretrained(base, folder).eval()
    if not hasattr(adapted, "merge_and_unload"):
        kind = adapted.active_peft_config.peft_type.value
        raise UnfitFolder(
            f"the adapter in {folder} is of type {kind}, which changes no weights and so cannot be "
            "merged; expected LoRA"
        )
    state = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    wanted = {name.removeprefix("base_model.model.") for name in state}
    missing = wanted - shapes.keys()
    extra = [name for name in shapes.keys() - wanted if not name.startswith(prefixes)]
    for names, words in ((missing, "lacks"), (extra, "has, for no layer of its base,")):
        if names:
            why = f"the adapter {words} {len(names)} weights: {listed(sorted(names))}"
            raise damaged(folder, why)
    return adapted


@torch.no_grad()
def _merge(folder: Path, adapted: nn.Module) -> PreTrainedModel:
    """Merge the adapter into the base's weights; refuse it if that changes the logits."""
    probe = _probe(adapted)
    expected = adapted(input_ids=probe, use_cache=False).logits
    _separate_tables(adapted)
    model = untie_if_separate(adapted.merge_and_unload()).eval()
    logits = model(input_ids=probe, use_cache=False).logits
    tolerance = 1e-3 if expected.dtype in (torch.float32, torch.float64) else 0.05
    if (logits - expected).abs().max() > tolerance * expected.abs().max():  # NaN: refused later
        raise UnfitFolder(
            f"the adapter in {folder} cannot be merged into its base: the logits would differ; "
            "merge it with peft and save the result"
        )
    return model.requires_grad_(True)


def _probe(adapted: nn.Module) -> torch.Tensor:
    """Token ids ``[2, 16]`` to compare logits on, among them ids whose rows the adapter trains."""
    rows = adapted.get_base_model().config.vocab_size
    ids = torch.randint(rows, (2, 16), generator=torch.Generator().manual_seed(0))
    trained = getattr(adapted.active_peft_config, "trainable_token_indices", None) or []
    chosen = trained if isinstance(trained, list) else next(iter(trained.values()))
    ids[0, : len(chosen[:16])] = torch.tensor(chosen[:16], dtype=ids.dtype)
    return ids


def _separate_tables(adapted: nn.Module) -> None:
    """Untie embedding and head if one is adapted: merging in place would change the other too."""
    model = adapted.get_base_model()
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not embedding.weight:
        return
    if hasattr(head, "lora_A") or hasattr(embedding, "lora_A"):
        linear = head.get_base_layer() if hasattr(head, "get_base_layer") else head
        linear.weight = nn.Parameter(linear.weight.detach().clone())
