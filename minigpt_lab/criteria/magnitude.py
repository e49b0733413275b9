"""Weight magnitude of a unit's coupled weights, without any data."""

from __future__ import annotations

import numpy as np

from ..families import Anatomy, weight_axis
from .scores import criterion


@criterion("magnitude")
def magnitude_scores(
    model, batches=None, statistics=None, *, sites, norm: str = "l2", reduce: str = "sum"
):
    """Sum of ``|w|^p`` over each tensor that belongs to a unit, reduced over the tensors.

    As in LLM-Pruner's released code (no p-th root); biases are left out.

    Parameters
    ----------
    norm : {"l1", "l2"}
        p = 1 or 2.
    reduce : {"sum", "mean"}
        How the coupled tensors' scores become one.

    Raises
    ------
    ValueError
        If an option is unknown.
    """
    if norm not in ("l1", "l2") or reduce not in ("sum", "mean"):
        raise ValueError(f"norm is 'l1' or 'l2', reduce 'sum' or 'mean'; got {norm!r}, {reduce!r}")
    anatomy, found = Anatomy(model), {}
    for site in sites:
        found[site] = []
        for layer, total in enumerate(anatomy.units(site)):
            tensors = []
            for projection, side in anatomy.coupled(site):
                module = anatomy.module(layer, projection)
                weight = module.weight.detach().float()
                powers = weight.abs() if norm == "l1" else weight.square()
                per_feature = powers.sum(1 - weight_axis(module, side)).cpu().numpy()
                features = anatomy.unit_positions(projection, total, layer=layer)
                tensors.append(per_feature[features].sum(1))
            found[site].append(np.sum(tensors, 0) / (len(tensors) if reduce == "mean" else 1))
    return found
