"""How much a whole layer turns what passes through it."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import pandas as pd
import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from ..checks import Batches, Model, checked, hooked
from ..domains import unpadded
from ..models import Anatomy, check_token_ids, inference


@checked(model=Model(), batches=Batches())
def block_influence(
    model: PreTrainedModel, batches: Iterable[dict[str, torch.Tensor]]
) -> pd.DataFrame:
    """``BI_l = 1 - mean_t cos(h_l, h_l+1)`` of every decoder layer (ShortGPT, arXiv 2403.03853).

    *h* is what enters and leaves a layer, the last one before the final norm. Plans cut inside
    layers, so this is no criterion of `score`: it says which layers to keep whole, or to cut most.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A supported causal language model.
    batches : iterable of dict
        Calibration tokens; padding is left out.

    Returns
    -------
    pandas.DataFrame
        Columns ``layer, influence``.

    Raises
    ------
    ValueError
        If there are no tokens, or a hidden state is not finite.
    """
    anatomy = Anatomy(model)
    sums, n_tokens = [0.0] * len(anatomy.layers), 0

    def hook(index: int):
        def add(_layer: nn.Module, args: tuple, kwargs: dict, output) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            cosine = functional.cosine_similarity(before.float(), after.float(), dim=-1)
            if not torch.isfinite(cosine).all():
                raise ValueError(f"layer {index} reads or writes NaN or infinite values")
            sums[index] += float(cosine.sum())

        return add

    hooks = [
        partial(layer.register_forward_hook, hook(index), with_kwargs=True)
        for index, layer in enumerate(anatomy.layers)
    ]
    with inference(model), hooked(*hooks):
        for ids in unpadded(batches):
            check_token_ids(model, ids)
            n_tokens += ids.numel()
            model.base_model(input_ids=ids.to(model.device), use_cache=False)
    influence = [1 - total / n_tokens for total in sums]
    return pd.DataFrame({"layer": range(len(influence)), "influence": influence})
