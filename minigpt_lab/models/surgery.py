"""Apply a plan: zero its units for a while (`masked`), or make a smaller model (`shrink`).

For every plan and family the masked and the shrunk model give the same logits; the whole kit relies
on that.
"""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from ..checks import Instance, Model, checked, locked, safe_contextmanager
from .anatomy import Anatomy, weight_axis
from .auto_classes import update_class, update_config
from .feature_masks import Masks, without_features
from .layers import add_bias, remove_bias
from .offloading import is_offloaded
from .plan import PruningPlan
from .resizing import set_units
from .sizes import dense_counts
from .vocabulary import TrimmedVocabulary

_PLAN = Instance(PruningPlan, "pass it after the model: shrink(model, plan), masked(model, plan)")
_masks: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # model to the masks on it
Slice = tuple[torch.Tensor, int, np.ndarray]  # a tensor, and the indices along one of its axes


@checked(plan=_PLAN, model=Model(lock=False))
@safe_contextmanager
def masked(model: PreTrainedModel, plan: PruningPlan) -> Iterator[PreTrainedModel]:
    """Zero everything that a plan prunes; then restore every weight, bit for bit.

    The tensors that a plan changes are put aside, untouched, and the model computes with zeroed
    copies of them, so memory holds these tensors twice. Changes to the copies are discarded at the
    end: train a shrunk model, not a masked one.

    Removed tokens get a logit of minus infinity. From zeroed rows alone they would get a logit of
    0, which can be likely (the reference code of Mini-GPTs leaves it there).

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
        At the end of the block, if the block of a later mask has not ended; all masks down to this
        one are then removed.
    """
    with locked(model):
        undo, masks = contextlib.ExitStack(), _masks.setdefault(model, [])
        masks.append(undo)
        try:
            # Copies made in inference mode could not be used outside of it.
            with torch.inference_mode(False), torch.no_grad():
                anatomy = _require_fit(model, plan)
                _zero_weights(anatomy, plan, undo)
                if plan.vocabulary is not None:
                    _mask_tokens(anatomy, plan.vocabulary, undo)
            yield model
        finally:
            _unmask(undo, masks)


def is_masked(model: PreTrainedModel) -> bool:
    """Whether a mask is on a model: it is inside the block of `masked`."""
    return bool(_masks.get(model))


def refuse_masked(model: PreTrainedModel) -> None:
    """Refuse to change a model for good under a mask, whose end would undo a part of it.

    Raises
    ------
    ValueError
        If a mask is on it.
    """
    if is_masked(model):
        raise ValueError(
            "the model is under a mask, whose end would undo a part of the change; leave the "
            "with block first, or change shrink(model, plan)"
        )


def _require_fit(model: PreTrainedModel, plan: PruningPlan) -> Anatomy:
    """Return the model's anatomy; refuse a plan that cannot be applied to it."""
    if is_offloaded(model):
        raise ValueError(
            "the model's weights are offloaded, where no plan reaches them; load it without "
            "offloading (device_map=None)"
        )
    return plan.require(model)


def _zero_weights(
    anatomy: Anatomy, plan: PruningPlan, undo: contextlib.ExitStack | None = None
) -> None:
    """Zero weights and shift biases; with `undo` in copies, where it registers how they go."""
    copied: set[nn.Parameter] = set()  # a tied parameter is copied once

    def own(parameter: nn.Parameter) -> nn.Parameter:
        if undo is not None and parameter not in copied:
            copied.add(parameter)
            undo.callback(_restore, parameter, parameter.data)
            parameter.data = parameter.detach().clone()
        return parameter

    if undo is not None and plan.shift:  # with added biases the model is of another class
        undo.callback(update_class, anatomy)
    nonzero = without_features(plan.kept_features(anatomy), plan.zero)
    for parameter, axis, features in (*_zeros(anatomy, nonzero), *_token_rows(anatomy, plan)):
        index = torch.as_tensor(features, device=parameter.device)
        own(parameter).index_fill_(axis, index, 0)
    for name, shift in plan.shift.items():
        module = anatomy.model.get_submodule(name)
        if module.bias is not None:
            own(module.bias)
        else:
            add_bias(module)
            if undo is not None:
                undo.callback(remove_bias, module)
        module.bias.add_(module.bias.new_tensor(shift))
    if undo is not None and plan.shift:
        update_class(anatomy)


def _restore(parameter: nn.Parameter, tensor: torch.Tensor) -> None:
    """Give a parameter its own tensor back, wherever the model has been moved meanwhile."""
    parameter.data = tensor.to(parameter.device, parameter.dtype)


def _mask_tokens(anatomy: Anatomy, kept: list[int], undo: contextlib.ExitStack) -> None:
    """Give removed tokens a logit of -∞, and record the allowed ones in `trimmed_vocabulary`."""
    model, cap = anatomy.model, anatomy.soft_cap()
    head = model.get_output_embeddings()
    removed = torch.ones(len(head.weight), dtype=torch.bool, device=head.weight.device)
    removed[kept] = False
    undo.callback(head.register_forward_hook(_logit_mask(removed, cap)).remove)
    undo.callback(anatomy.set_soft_cap, cap)
    anatomy.set_soft_cap(None)  # tanh would make -∞ finite: the hook applies the cap before it
    before = getattr(model, "trimmed_vocabulary", None)
    undo.callback(_set_vocabulary, model, before)
    model.trimmed_vocabulary = TrimmedVocabulary.of(model).masked(kept)


def _logit_mask(removed: torch.Tensor, cap: float | None) -> Callable:
    """Forward hook of the head: apply the soft cap, then set the removed tokens' logits to -∞."""

    def hook(_module: nn.Module, _args: tuple, logits: torch.Tensor) -> torch.Tensor:
        if cap is not None:
            logits = torch.tanh(logits / cap) * cap
        return logits.masked_fill(removed, float("-inf"))

    return hook


def _set_vocabulary(model: PreTrainedModel, vocabulary: TrimmedVocabulary | None) -> None:
    vars(model).pop("trimmed_vocabulary", None)
    if vocabulary is not None:
        model.trimmed_vocabulary = vocabulary


def _unmask(mask: contextlib.ExitStack, masks: list[contextlib.ExitStack]) -> None:
    """Take off a mask, after those that were put on later."""
    if mask not in masks:
        return  # a mask entered before it was left first, and took it off too
    place = masks.index(mask)
    ended, masks[place:] = masks[place:], []
    with contextlib.ExitStack() as undo:  # if one of them raises, the others are undone
        for each in ended:
            undo.push(each)
    if len(ended) > 1:
        raise RuntimeError(
            f"a mask was left while {len(ended) - 1} later on the same model had not been; leave "
            "masks in the reverse of the order in which they were entered (all are off now)"
        )


def _zeros(anatomy: Anatomy, nonzero: Masks) -> Iterator[Slice]:
    """Parameters of the linear layers, and the features along their axes that the masks lack."""
    for name, masks in nonzero.items():
        module = anatomy.model.get_submodule(name)
        slices = [(module.weight, weight_axis(module, side), side) for side in ("input", "output")]
        if module.bias is not None:
            slices.append((module.bias, 0, "bias"))
        for parameter, axis, side in slices:
            if not masks[side].all():
                yield parameter, axis, np.flatnonzero(~masks[side])


def _token_rows(anatomy: Anatomy, plan: PruningPlan) -> Iterator[Slice]:
    """Embedding, head and the head's bias, and the rows of the tokens that a plan removes."""
    if plan.vocabulary is None:
        return
    tokens = np.setdiff1d(np.arange(plan.vocabulary_size), plan.vocabulary)
    yield anatomy.model.get_input_embeddings().weight, 0, tokens
    if not anatomy.head_is_tied():
        head = anatomy.model.get_output_embeddings()
        yield head.weight, 0, tokens
        if head.bias is not None:
            yield head.bias, 0, tokens


@checked(plan=_PLAN, model=Model())
@torch.inference_mode(False)  # what is made there could not be trained or hashed later
@torch.no_grad()
def shrink(model: PreTrainedModel, plan: PruningPlan) -> PreTrainedModel:
    """Make a smaller model, without the units and tokens that a plan removes.

    FFN channels, heads (key/value groups, query heads of every group) and tokens are removed;
    features that can only be zeroed are zeroed, and biases shifted. The config gets the new widths
    where all layers have the same.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Not changed.
    plan : PruningPlan
        A plan that fits the model.

    Returns
    -------
    transformers.PreTrainedModel
        Its attribute ``pruning_plans`` lists the plans that made it. If tokens were removed,
        `perplexity`, `save_model` and the other functions of this kit trim the tokenizer by
        themselves; `tokenizer_for` gives it.

    Raises
    ------
    ValueError, TypeError
        If the plan does not fit the model, or is none.
    """
    _require_fit(model, plan)
    mini = copy.deepcopy(model)
    anatomy = Anatomy(mini)
    # 1. Zero features and shift biases, while the plan's indices are those of the layers.
    _zero_weights(anatomy, plan)
    # 2. Remove units and tokens.
    set_units(anatomy, plan.keep)
    update_config(anatomy)
    mini.config.minigpt_lab_dense = dense_counts(model)
    if plan.vocabulary is not None:
        mini.trimmed_vocabulary = TrimmedVocabulary.of(model).trimmed(plan.vocabulary)
        _trim_vocabulary(mini, plan.vocabulary)
    mini.pruning_plans = [*getattr(model, "pruning_plans", []), plan]
    return mini


def _trim_vocabulary(model: PreTrainedModel, kept: list[int]) -> None:
    """Keep only some rows of the embedding and the head, and renumber special ids, in place."""
    tied = Anatomy(model).head_is_tied()
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    index = torch.tensor(kept, device=embedding.weight.device)
    new_id = {old: new for new, old in enumerate(kept)}
    embedding.weight = _rows(embedding.weight, index)
    embedding.num_embeddings = len(kept)
    if embedding.padding_idx is not None:
        embedding.padding_idx = new_id.get(embedding.padding_idx)
    if head is not None:
        head.weight = embedding.weight if tied else _rows(head.weight, index)
        if head.bias is not None:
            head.bias = _rows(head.bias, index)
        head.out_features = len(kept)
    model.config.vocab_size = len(kept)
    if hasattr(model, "vocab_size"):
        model.vocab_size = len(kept)
    for config in filter(None, (model.config, model.generation_config)):
        for name, value in config.to_dict().items():
            if name.endswith("_token_id") and isinstance(value, list):
                setattr(config, name, [new_id[token] for token in value if token in new_id])
            elif name.endswith("_token_id") and value is not None:
                setattr(config, name, new_id.get(value))


def _rows(parameter: nn.Parameter, index: torch.Tensor) -> nn.Parameter:
    """Some rows of a parameter, as a new one."""
    return nn.Parameter(parameter.index_select(0, index), requires_grad=parameter.requires_grad)
