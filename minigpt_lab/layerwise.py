"""Layer by layer through a model, each fed with what the layers before it have become."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel

from .families import Anatomy
from .runtime import check_token_ids, inference
from .tokens import unpadded


def walk(
    model: PreTrainedModel,
    batches: Iterable[dict[str, torch.Tensor]],
    visit: Callable[[int, Callable[[], None]], None],
) -> None:
    """Visit the decoder layers in order, for methods that change one layer after another.

    Memory holds every batch's hidden states at one depth. Padding is left out (see `unpadded`).

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A supported causal language model.
    batches : iterable of dict
        ``input_ids`` and, if there is padding, ``attention_mask``.
    visit : callable
        ``(layer, forward)``, called without gradients. ``forward()`` sends all tokens through the
        layer as it is at that moment; hooks see them. After the visit the layer runs once more, and
        its outputs are the next one's inputs.
    """
    anatomy = Anatomy(model)
    hidden: list[torch.Tensor] = []
    calls: list[list[dict]] = []  # [batch][layer]: masks and positions may differ between layers

    def record(_layer, args: tuple, kwargs: dict) -> None:
        if not calls[-1]:
            hidden.append(args[0] if args else kwargs["hidden_states"])
        calls[-1].append({k: v for k, v in kwargs.items() if k != "hidden_states"})

    with inference(model):
        handles = [
            layer.register_forward_pre_hook(record, with_kwargs=True) for layer in anatomy.layers
        ]
        try:
            for ids in unpadded(batches):
                check_token_ids(model, ids)
                calls.append([])
                model.base_model(input_ids=ids.to(model.device), use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        for index, layer in enumerate(anatomy.layers):
            forward = partial(_through, layer, hidden, [kwargs[index] for kwargs in calls])
            visit(index, forward)
            if index + 1 < len(anatomy.layers):
                hidden = forward()


def _through(layer: nn.Module, hidden: list[torch.Tensor], calls: list[dict]) -> list[torch.Tensor]:
    outputs = (layer(x, **kwargs) for x, kwargs in zip(hidden, calls, strict=True))
    return [out[0] if isinstance(out, tuple) else out for out in outputs]
