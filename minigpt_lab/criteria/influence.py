"""Influence of whole decoder layers on the hidden states (ShortGPT)."""

from __future__ import annotations

from collections.abc import Iterable

import pandas as pd
import torch
from torch.nn import functional
from transformers import PreTrainedModel

from ..calibration import run_decoder, watch
from ..checks import Batches, Model, checked
from ..domains import unpadded
from ..models import Anatomy, inference


@checked(model=Model(), batches=Batches())
def block_influence(
    model: PreTrainedModel, batches: Iterable[dict[str, torch.Tensor]]
) -> pd.DataFrame:
    """``BI_l = 1 - mean_t cos(h_l, h_l+1)`` of every decoder layer (ShortGPT, arXiv 2403.03853).

    *h_l* and *h_l+1* are the hidden states before and after layer *l*; those after the last layer
    are taken before the final norm. Plans prune inside layers, so this is no criterion of `score`:
    it shows which layers to keep whole (`keep_layers`), or to prune most.

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
    layers = {str(index): layer for index, layer in enumerate(Anatomy(model).layers)}
    cosines, n_tokens = dict.fromkeys(layers, 0.0), 0

    def add(layer: str, before: torch.Tensor, after: torch.Tensor) -> None:
        """Add the tokens' cosines of hidden states ``[batch, token, feature]``."""
        cosine = functional.cosine_similarity(before.float(), after.float(), dim=-1)
        if not torch.isfinite(cosine).all():
            raise ValueError(f"layer {layer} reads or writes NaN or infinite values")
        cosines[layer] += float(cosine.sum())

    with inference(model), watch(layers, after=add):
        for ids in unpadded(batches):
            run_decoder(model, ids)
            n_tokens += ids.numel()
    influence = [1 - total / n_tokens for total in cosines.values()]
    return pd.DataFrame({"layer": range(len(influence)), "influence": influence})
