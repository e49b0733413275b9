"""Loss of the outputs without a weight, once the others make up for it (SparseGPT's criterion)."""

from __future__ import annotations

import torch

from ..calibration import collect_hessians, damped_inverse
from ..checks import Integer, Number, checked
from .scores import criterion
from .units import by_input, per_feature, scored_layers, unit_scores


@criterion("sparsegpt")
@checked(damping=Number(0), layers_per_pass=Integer(1) | None)
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
    for its baseline. Here H⁻¹ is that of all columns; SparseGPT's code goes from left to right and
    takes the one of those that are still to come. Whether MINI-LLM's baseline updates the weights
    that stay is not in the source at hand; `weight_compensated` is an update that goes with these
    scores. Features that are always zero cost nothing to remove.

    Parameters
    ----------
    scope : {"consumer", "coupled"}
        The o/down columns only, whose error is what removing the unit does to the layer; or all
        weights of a unit.
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
        raise ValueError("the sparsegpt criterion needs batches: statistics hold no covariances")
    layer_of = scored_layers(model, sites, scope)
    step = layers_per_pass or len(layer_of)
    hessians = None

    def error(name, module, side):
        nonlocal hessians
        if hessians is None or name not in hessians.matrices:
            first = layer_of[name]
            hessians = None  # before the next ones are made
            names = [n for n, layer in layer_of.items() if first <= layer < first + step]
            hessians = collect_hessians(model, batches, names)
        hessian = hessians.matrices[name]
        alive = hessian.diagonal() > 0
        cost = alive / damped_inverse(hessian, damping)[1].diagonal()
        weight = module.weight.float()
        return per_feature(weight.square() * by_input(cost.to(torch.float32), module), module, side)

    return unit_scores(model, sites, error, scope)
