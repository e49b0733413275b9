"""Saliency of weights once the others compensate for them (SparseGPT)."""

from __future__ import annotations

import torch

from ..calibration import collect_hessians, damped_inverse
from ..checks import Integer, Number, checked
from .scores import criterion
from .units import SCOPE, scored_layers, unit_scores


@criterion("sparsegpt")
@checked(scope=SCOPE, damping=Number(0), layers_per_pass=Integer(1) | None)
def sparsegpt_scores(
    model,
    batches=None,
    statistics=None,
    *,
    sites,
    scope: str = "consumer",
    damping: float = 0.01,
    layers_per_pass: int | None = None,
):
    """``Σ W_ij² / [H⁻¹]_jj`` over a unit's weights, with ``H = X Xᵀ / N`` of the layer's inputs.

    SparseGPT's criterion (arXiv 2301.00774) summed over units, as MINI-LLM (arXiv 2407.11681) does
    for its baseline. Here H contains all columns; SparseGPT's code goes from left to right and
    inverts the H of those columns that it has not reached yet. Whether MINI-LLM's baseline
    updates the remaining weights is not known here; `weight_compensated` is an update that suits
    these scores. Features that are always zero cost nothing to remove.

    Parameters
    ----------
    scope : {"consumer", "coupled"}
        The o/down columns only, so that a score estimates the error of the layer's outputs without
        the unit; or all weights of a unit.
    damping : float
        Share of the mean diagonal of H that is added to it (SparseGPT's 0.01).
    layers_per_pass : int, optional
        Keep the Hessians of only so many layers at once, at the price of more passes.

    Raises
    ------
    ValueError
        If there are no batches, or an option is out of range.
    """
    if batches is None:
        raise ValueError("it needs batches: statistics hold no covariances")
    layer_of = scored_layers(model, sites, scope)
    costs = _column_costs(model, batches, layer_of, damping, layers_per_pass)

    def saliency(linear):
        return linear.per_feature(linear.W.square() * linear.row(costs[linear.name]))

    return unit_scores(model, sites, saliency, scope=scope)


def _column_costs(
    model, batches, layer_of: dict[str, int], damping: float, layers_per_pass: int | None
) -> dict[str, torch.Tensor]:
    """``1 / [H⁻¹]_jj`` of every linear layer ``[input]``; 0 for features that are always zero."""
    depth = max(layer_of.values()) + 1
    step = layers_per_pass or depth
    costs = {}
    for first in range(0, depth, step):
        names = [name for name, layer in layer_of.items() if first <= layer < first + step]
        for name, H in collect_hessians(model, batches, names).matrices.items():
            _, H_inv = damped_inverse(H, damping)
            costs[name] = (H.diagonal() > 0) / H_inv.diagonal()
    return costs
