"""Carrying out a plan: zeroing in place and back, or removing for good.

For every plan and family the masked and the shrunk model give the same logits: that is the rule
the whole kit stands on.
"""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from ..checks import Instance, Model, checked, locked, safe_contextmanager
from .anatomy import Anatomy, weight_axis
from .layers import add_bias, remove_bias
from .offloading import is_offloaded
from .plan import PruningPlan
from .resizing import set_units, update_config
from .vocabulary import TrimmedVocabulary

_PLAN = Instance(PruningPlan, "pass it after the model: shrink(model, plan), masked(model, plan)")
_masks: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # model to the masks on it


@checked(plan=_PLAN, model=Model(lock=False))
@safe_contextmanager
def masked(model: PreTrainedModel, plan: PruningPlan) -> Iterator[PreTrainedModel]:
    """Zero everything that a plan cuts; every weight is its old self, bit for bit, on leaving.

    The tensors that a plan cuts are put aside, untouched, and the model computes with zeroed copies
    of them: memory holds the cut tensors twice. What is written into those copies is lost on
    leaving: train a shrunk model, not a masked one.

    Removed tokens get a logit of minus infinity: zeroed rows would get 0, which is not unlikely
    (the reference code of Mini-GPTs leaves it there).

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Changed inside the ``with`` block only, however that ends. Other threads wait for it
        meanwhile.
    plan : PruningPlan
        A plan that fits the model.

    Yields
    ------
    transformers.PreTrainedModel
        The same model.

    Raises
    ------
    ValueError, TypeError
        If the plan does not fit the model, or is none.
    RuntimeError
        On leaving, if a mask that was put on later has not been left yet; all masks down to this
        one are then taken off.
    """
    with locked(model):
        mask, masks = contextlib.ExitStack(), _masks.setdefault(model, [])
        masks.append(mask)
        try:
            # in inference mode the copies could not be computed with outside of it
            with torch.inference_mode(False), torch.no_grad():
                _zero(model, plan, mask)
            yield model
        finally:
            _take_off(mask, masks)


def refuse_masked(model: PreTrainedModel) -> None:
    """Refuse to change a model for good under a mask, whose end would undo a part of it.

    Raises
    ------
    ValueError
        If a mask is on it.
    """
    if _masks.get(model):
        raise ValueError(
            "the model is under a mask, whose end would undo a part of the change; leave the "
            "with block first, or change shrink(model, plan)"
        )


def _zero(model: PreTrainedModel, plan: PruningPlan, undo: contextlib.ExitStack) -> None:
    """Put a mask on; what takes it off again stands in `undo` before anything is changed."""
    anatomy = _fitting(model, plan)
    own: set[nn.Parameter] = set()  # parameters that have a copy already; tied ones are one

    def copied(parameter: nn.Parameter) -> nn.Parameter:
        if parameter not in own:
            own.add(parameter)
            undo.callback(_put, parameter, parameter.data)
            parameter.data = parameter.detach().clone()
        return parameter

    for parameter, axis, features in _cuts(anatomy, plan):
        index = torch.as_tensor(features, device=parameter.device)
        copied(parameter).index_fill_(axis, index, 0)
    for module, shift in _shifts(model, plan):
        if module.bias is None:
            add_bias(module)
            undo.callback(remove_bias, module)
        else:
            copied(module.bias)
        module.bias.add_(shift)
    if plan.vocabulary is not None:
        head, cap = model.get_output_embeddings(), anatomy.soft_cap()
        undo.callback(head.register_forward_hook(_forbid(plan, head.weight.device, cap)).remove)
        undo.callback(anatomy.set_soft_cap, cap)
        anatomy.set_soft_cap(None)  # it would make minus infinity finite; the hook applies it
        trimmed = TrimmedVocabulary.of(model).cut(plan.vocabulary, mask=True)
        before = vars(model).copy()
        undo.callback(_put_attribute, model, "trimmed_vocabulary", before)
        model.trimmed_vocabulary = trimmed


def _put(parameter: nn.Parameter, tensor: torch.Tensor) -> None:
    """Give a parameter its own tensor back, wherever the model has been moved meanwhile."""
    parameter.data = tensor.to(parameter.device, parameter.dtype)


def _put_attribute(model: PreTrainedModel, name: str, before: dict) -> None:
    vars(model).pop(name, None)
    if name in before:
        vars(model)[name] = before[name]


def _take_off(mask: contextlib.ExitStack, masks: list[contextlib.ExitStack]) -> None:
    """Take off a mask, and first those that were put on after it."""
    if mask not in masks:
        return  # one below it was left first
    place = masks.index(mask)
    gone, masks[place:] = masks[place:], []
    with contextlib.ExitStack() as undo:  # whatever one of them raises, the others are undone
        for each in gone:
            undo.push(each)
    if len(gone) > 1:
        raise RuntimeError(
            f"a mask was left while {len(gone) - 1} later on the same model had not been; leave "
            "masks in the reverse of the order in which they were entered (all are off now)"
        )


def _fitting(model: PreTrainedModel, plan: PruningPlan) -> Anatomy:
    """The anatomy of a model that a plan fits."""
    if is_offloaded(model):
        raise ValueError(
            "the model's weights wait outside its device, where no plan reaches them; load it "
            "without offloading (device_map=None)"
        )
    return plan.require(model)


def _cuts(anatomy: Anatomy, plan: PruningPlan) -> Iterator[tuple[torch.Tensor, int, np.ndarray]]:
    """Every tensor, axis and features that a plan zeroes in the mask."""
    for site, layers in plan.keep.items():
        for layer, units in enumerate(layers):
            total = plan.units[site][layer]
            gone = np.setdiff1d(np.arange(total), units)
            for projection, side in anatomy.coupled(site) if len(gone) else ():
                module = anatomy.module(layer, projection)
                features = anatomy.unit_features(projection, layer)[gone].ravel()
                yield module.weight, weight_axis(module, side), features
                if side == "output" and module.bias is not None:
                    yield module.bias, 0, features
    yield from _zero_cuts(anatomy, plan)
    if plan.vocabulary is not None:
        gone = np.setdiff1d(np.arange(plan.vocabulary_size), plan.vocabulary)
        yield anatomy.model.get_input_embeddings().weight, 0, gone
        if not anatomy.head_is_tied():
            head = anatomy.model.get_output_embeddings()
            yield from (
                (tensor, 0, gone) for tensor in (head.weight, head.bias) if tensor is not None
            )


def _zero_cuts(
    anatomy: Anatomy, plan: PruningPlan
) -> Iterator[tuple[torch.Tensor, int, np.ndarray]]:
    """Tensor, axis and features of what is zeroed without leaving."""
    for name, sides in plan.zero.items():
        module = anatomy.model.get_submodule(name)
        for side in ("input", "output"):
            if side in sides:
                yield module.weight, weight_axis(module, side), np.array(sides[side], np.int64)
        if "bias" in sides and module.bias is not None:
            yield module.bias, 0, np.array(sides["bias"], np.int64)


def _shifts(model: PreTrainedModel, plan: PruningPlan) -> Iterator[tuple[nn.Module, torch.Tensor]]:
    """Linear layers whose bias a plan shifts, and by how much."""
    for name, values in plan.shift.items():
        module = model.get_submodule(name)
        yield module, module.weight.new_tensor(values)


def _forbid(plan: PruningPlan, device: torch.device, cap: float | None):
    gone = torch.ones(plan.vocabulary_size, dtype=torch.bool)
    gone[plan.vocabulary] = False
    gone = gone.to(device)

    def hook(_module: nn.Module, _args: tuple, logits: torch.Tensor) -> torch.Tensor:
        if cap is not None:
            logits = torch.tanh(logits / cap) * cap
        return logits.masked_fill(gone, float("-inf"))

    return hook


@checked(plan=_PLAN, model=Model())
@torch.inference_mode(False)  # what is made there could not be trained or hashed later
@torch.no_grad()
def shrink(model: PreTrainedModel, plan: PruningPlan) -> PreTrainedModel:
    """A new model without the units and tokens that a plan removes.

    FFN channels, heads (key/value groups, query heads of every group) and tokens leave for good;
    features that can only be zeroed are zeroed, and biases shifted. Widths go into the config where
    all layers agree.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Left as it is.
    plan : PruningPlan
        A plan that fits the model.

    Returns
    -------
    transformers.PreTrainedModel
        Its attribute ``pruning_plans`` lists the plans that made it. If tokens left, `perplexity`,
        `save_model` and the other functions of this kit trim the tokenizer by themselves;
        `tokenizer_for` gives it.

    Raises
    ------
    ValueError, TypeError
        If the plan does not fit the model, or is none.
    """
    _fitting(model, plan)
    mini = copy.deepcopy(model)
    anatomy = Anatomy(mini)
    for tensor, axis, features in _zero_cuts(anatomy, plan):
        tensor.index_fill_(axis, torch.as_tensor(features, device=tensor.device), 0)
    for module, shift in _shifts(mini, plan):
        if module.bias is None:
            add_bias(module)
        module.bias.add_(shift)
    set_units(anatomy, plan.keep)
    update_config(anatomy)
    if plan.vocabulary is not None:
        mini.trimmed_vocabulary = TrimmedVocabulary.of(model).cut(plan.vocabulary, mask=False)
        _trim_vocabulary(mini, plan.vocabulary)
    mini.pruning_plans = [*getattr(model, "pruning_plans", []), plan]
    return mini


def _trim_vocabulary(model: PreTrainedModel, kept: list[int]) -> None:
    """Keep only some rows of the embedding and the head, and renumber special ids, in place."""
    tied = Anatomy(model).head_is_tied()
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    index = torch.tensor(kept, device=embedding.weight.device)
    embedding.weight = _rows(embedding.weight, index)
    embedding.num_embeddings = len(kept)
    new = {old: place for place, old in enumerate(kept)}
    if embedding.padding_idx is not None:
        embedding.padding_idx = new.get(embedding.padding_idx)
    if head is not None:
        head.weight = embedding.weight if tied else _rows(head.weight, index)
        if head.bias is not None:
            head.bias = nn.Parameter(head.bias.index_select(0, index))
        head.out_features = len(kept)
    model.config.vocab_size = len(kept)
    if hasattr(model, "vocab_size"):
        model.vocab_size = len(kept)
    for config in filter(None, (model.config, model.generation_config)):
        for name, value in config.to_dict().items():
            if name.endswith("_token_id") and value is not None:
                listed = isinstance(value, list)
                setattr(
                    config, name, [new[i] for i in value if i in new] if listed else new.get(value)
                )


def _rows(parameter: nn.Parameter, index: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(parameter.index_select(0, index), requires_grad=parameter.requires_grad)
