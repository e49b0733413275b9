"""Influence of decoder layers, and of the blocks in them, on the hidden states (ShortGPT)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import pandas as pd
import torch
from torch.nn import functional
from transformers import PreTrainedModel

from ..calibration import first_output, patched_forward, run_decoder, watch
from ..checks import Batches, ListOf, Model, OneOf, checked
from ..domains import unpadded
from ..models import SITES, Anatomy, inference


@checked(model=Model(), batches=Batches(), sites=ListOf(OneOf((*SITES, "layer")), 1))
def block_influence(
    model: PreTrainedModel,
    batches: Iterable[dict[str, torch.Tensor]],
    *,
    sites: Sequence[str] = ("layer",),
) -> pd.DataFrame:
    """``BI = 1 - mean_t cos(h, h')`` of decoder layers or blocks (ShortGPT, arXiv 2403.03853).

    For a whole layer, *h* and *h'* are the hidden states before and after it; those after the last
    layer are taken before the final norm. For a layer's attention or FFN they are the hidden states
    after the layer without that block and with it, so the influence is that of `masked`: a block's
    bias stays, and the other block reads the changed states.

    It shows which layers to keep whole (`keep_layers`), and `plan_dropping` drops by it.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A supported causal language model.
    batches : iterable of dict
        Calibration tokens; padding is left out.
    sites : sequence of {"layer", "ffn", "attention"}
        What to score. Each block takes another run of its layer.

    Returns
    -------
    pandas.DataFrame
        Columns ``layer, site, influence``. Blocks that were dropped before have no row.

    Raises
    ------
    ValueError
        If there are no tokens, or a hidden state is not finite.
    """
    anatomy, sites = Anatomy(model), tuple(dict.fromkeys(sites))
    cosines = {
        (layer, site): 0.0
        for site in sites
        for layer, units in enumerate(zip(*map(anatomy.units, SITES), strict=True))
        if (any(units) if site == "layer" else anatomy.units(site)[layer])
    }
    n_tokens = 0

    def record(layer: int, forward: Callable, *args, **kwargs):
        """Run a layer, and compare its output with those without its blocks."""
        output = forward(*args, **kwargs)
        for site in sites:
            if (layer, site) not in cosines:  # dropped before
                continue
            if site == "layer":
                other = args[0] if args else kwargs["hidden_states"]
            else:
                reader = anatomy.module(layer, anatomy.family.consumes[site])
                with watch({site: reader}, before=lambda _, x: torch.zeros_like(x)):
                    other = first_output(forward(*args, **kwargs))
            add(layer, site, first_output(output), other)
        return output

    def add(layer: int, site: str, after: torch.Tensor, before: torch.Tensor) -> None:
        """Add the tokens' cosines of hidden states ``[batch, token, feature]``."""
        cosine = functional.cosine_similarity(before.float(), after.float(), dim=-1)
        if not torch.isfinite(cosine).all():
            raise ValueError(f"layer {layer} reads or writes NaN or infinite values")
        cosines[layer, site] += float(cosine.sum())

    with inference(model, "auto"), contextlib.ExitStack() as patches:
        for index, layer in enumerate(anatomy.layers):
            patches.enter_context(patched_forward([layer], partial(record, index)))
        for ids in unpadded(batches):
            run_decoder(model, ids)
            n_tokens += ids.numel()
    rows = [(*block, 1 - total / n_tokens) for block, total in cosines.items()]
    return pd.DataFrame(rows, columns=["layer", "site", "influence"])
