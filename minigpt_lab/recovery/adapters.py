"""What recovery trains: all weights, or LoRA adapters; either way, zeros stay zero."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterator, Sequence

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from ..assets import nearest
from ..families import Anatomy, weight_axis


def adapter_targets(model: PreTrainedModel, wanted: Sequence[str] | None) -> list[str]:
    """Full names of the linear layers that adapters go on.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Of a known family.
    wanted : sequence of str, optional
        Full names, or their last parts (``"q_proj"``); by default every linear layer of the
        decoder.

    Raises
    ------
    ValueError
        If a name fits no linear layer.
    """
    names = [name for _, name, _ in Anatomy(model).linears()]
    if wanted is None:
        return names
    for target in wanted:
        if not any(_fits(name, target) for name in names):
            known = names if "." in target else sorted({name.rpartition(".")[2] for name in names})
            raise ValueError(f"no linear layer {target!r} to adapt; {nearest(target, known)}")
    chosen = [name for name in names if any(_fits(name, target) for target in wanted)]
    if not chosen:
        raise ValueError("targets is empty; give at least one name, or None for every linear layer")
    return chosen


def _fits(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


@contextlib.contextmanager
def adapted(
    model: PreTrainedModel, names: Sequence[str] | None = None, **lora
) -> Iterator[nn.Module]:
    """The model made ready to train, and made plain again on leaving.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Trained itself, or adapted.
    names : sequence of str, optional
        Linear layers that get a LoRA adapter, merged on leaving; None trains all weights.
    **lora
        Of `peft.LoraConfig`.

    Yields
    ------
    torch.nn.Module
        What to train.
    """
    gradients = {parameter: parameter.requires_grad for parameter in model.parameters()}
    training, use_cache = model.training, model.config.use_cache
    try:
        if names is None:
            # checkpoints with the names in memory: the Trainer knows no others when it reads one,
            # and passes over what it does not know
            names_kept = functools.partial(model.save_pretrained, save_original_format=False)
            model.save_pretrained = names_kept
            try:
                with _zeros_kept(model):
                    yield model
            finally:
                del model.save_pretrained
            return
        with warnings.catch_warnings():  # peft asks transformers by a name that it now warns of
            warnings.simplefilter("ignore", FutureWarning)
            transposed = weight_axis(model.get_submodule(names[0]), "output") == 1
            config = LoraConfig(target_modules=list(names), fan_in_fan_out=transposed, **lora)
            peft = get_peft_model(model, config)
        # checkpoints without embeddings: peft asks the hub whether a pruned one has changed
        peft.save_pretrained = functools.partial(peft.save_pretrained, save_embedding_layers=False)
        try:
            with torch.no_grad():
                for name in names:
                    _spare_zeros(model.get_submodule(name))
            yield peft
        finally:
            peft.merge_and_unload()
    finally:
        for parameter in model.parameters():
            parameter.requires_grad_(gradients.get(parameter, True))
        model.train(training)
        model.activation_checkpointing_disable()
        model.config.use_cache = use_cache


def _spare_zeros(layer: nn.Module) -> None:
    """Keep an adapter from filling rows and columns that are zero in the weight it adapts."""
    zero = layer.base_layer.weight == 0
    inputs, outputs = (weight_axis(layer.base_layer, side) for side in ("input", "output"))
    for factor, places, axis in (
        (layer.lora_A["default"].weight, zero.all(outputs), 1),
        (layer.lora_B["default"].weight, zero.all(inputs), 0),
    ):
        if places.any():
            mask = places.unsqueeze(1 - axis)
            factor.masked_fill_(mask, 0)
            factor.register_hook(lambda grad, mask=mask: grad.masked_fill(mask, 0))


@contextlib.contextmanager
def _zeros_kept(model: PreTrainedModel) -> Iterator[None]:
    """No gradient for weights that are zero; decoupled weight decay leaves zeros alone."""
    handles = []
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dim() == 2:
            zero = parameter.detach() == 0
            if zero.any():
                handles.append(
                    parameter.register_hook(lambda grad, zero=zero: grad.masked_fill(zero, 0))
                )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
