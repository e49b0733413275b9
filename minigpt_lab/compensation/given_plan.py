"""Compensation of a plan that is already made: FLAP's bias, or least-squares weights."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import torch
from transformers import PreTrainedModel

from ..calibration import Hessians, Statistics, damped_inverse, refit
from ..checks import Instance, Model, Number, checked
from ..models import Anatomy, PruningPlan, weight_axis


@checked(model=Model(), plan=Instance(PruningPlan), statistics=Instance(Statistics))
@torch.no_grad()
def bias_compensated(
    model: PreTrainedModel, plan: PruningPlan, statistics: Statistics
) -> PruningPlan:
    """Add FLAP's bias compensation to a plan: ``b += W[:, removed] E[x_removed]``.

    The mean output of the removed units goes into the bias of the projection that reads them, which
    gets one where the layer has none (arXiv 2312.11983). `masked` and `shrink` apply it.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        The model that the statistics and the plan are of.
    plan : PruningPlan
        The units to remove.
    statistics : Statistics
        Statistics of the calibration text; the mean of every feature is used.

    Raises
    ------
    ValueError
        If the plan or the statistics do not fit the model.
    """
    statistics.require(model)
    shift = {}
    for name, masks in plan.kept_features(plan.require(model)).items():
        if masks["input"].all():  # it reads no removed unit
            continue
        module = model.get_submodule(name)
        mean = statistics.mean(name, "input", "sum")
        mean = np.where(masks["input"], 0, mean)  # of removed features [in]
        W = module.weight.float().movedim(weight_axis(module, "output"), 0)  # [out, in]
        mean = torch.as_tensor(mean, dtype=W.dtype, device=W.device)
        shift[name] = (W * mean).sum(1).cpu().tolist()  # [out]
    return replace(plan, shift=shift, origin={**plan.origin, "bias_compensation": True})


@checked(model=Model(), plan=Instance(PruningPlan), hessians=Instance(Hessians), damping=Number(0))
@torch.inference_mode(False)  # weights made under it could not be trained or hashed later
@torch.no_grad()
def weight_compensated(
    model: PreTrainedModel, plan: PruningPlan, hessians: Hessians, *, damping: float = 0.01
) -> PreTrainedModel:
    """Copy a model with the kept o/down columns refitted: ``W' = W H[:, kept] (H[kept, kept])⁻¹``.

    This is the least-squares optimum. Optimal Brain Surgeon, which removes one column after another
    and updates all others, ends there too, in whatever order it removes them. SparseGPT's update is
    weaker: it goes from left to right once, and updates only the columns to the right of a removed
    one.

    The removed columns are still there: apply the plan to the copy, by ``masked(copy, plan)`` or
    ``shrink(copy, plan)``. All Hessians are of the dense model, so a layer is not fitted to the
    outputs of pruned layers before it, as it is by `slimgpt`.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Left as it is.
    plan : PruningPlan
        The units to remove.
    hessians : Hessians
        Of the projections that read the units (o/down), of this model.
    damping : float
        Share of the mean of H's diagonal that is added to the diagonal.

    Raises
    ------
    ValueError
        If plan or Hessians do not fit the model, or one of them lacks a layer.
    """
    hessians.require(model)
    plan.require(model)
    updated = copy.deepcopy(model)
    for name, masks in plan.kept_features(Anatomy(updated)).items():
        if masks["input"].all():  # it reads no removed unit: nothing to refit
            continue
        module = updated.get_submodule(name)
        axis, H = weight_axis(module, "input"), hessians.matrices.get(name)
        if H is None:
            raise ValueError(f"there is no Hessian of {name}; collect_hessians with it")
        H_damped, _ = damped_inverse(H, damping, "mean")
        kept = torch.as_tensor(np.flatnonzero(masks["input"]), device=H_damped.device)
        W = module.weight.to(H_damped).movedim(axis, 1)  # [out, in]
        W_kept = refit(W, H_damped, kept)  # [out, kept]
        module.weight.index_copy_(axis, kept, W_kept.movedim(1, axis).to(module.weight))
    return updated
