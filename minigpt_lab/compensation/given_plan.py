"""Compensation of a plan that is already made: FLAP's bias, or least-squares weights."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import torch
from transformers import PreTrainedModel

from ..calibration import Hessians, Statistics, damped_inverse, refit
from ..checks import Instance, Model, Number, checked
from ..criteria import by_input, per_feature
from ..models import Anatomy, PruningPlan, weight_axis


@checked(model=Model(), plan=Instance(PruningPlan), statistics=Instance(Statistics))
@torch.no_grad()
def bias_compensated(model, plan: PruningPlan, statistics: Statistics) -> PruningPlan:
    """The plan with FLAP's bias compensation: ``b += W[:, removed] · mean(X[removed])``.

    What a removed unit writes on average goes into the bias of the projection that read it, which
    gets one where the layer had none (arXiv 2312.11983). `masked` and `shrink` carry it out.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        The model that the statistics and the plan are of.
    plan : PruningPlan
        Which units leave.
    statistics : Statistics
        For the mean of every feature.

    Raises
    ------
    ValueError
        If the plan or the statistics do not fit the model.
    """
    statistics.require(model)
    anatomy, shift = plan.require(model), {}
    for site, layers in plan.keep.items():
        for layer, units in enumerate(layers):
            total, consumer = plan.units[site][layer], anatomy.family.consumes[site]
            gone = np.setdiff1d(np.arange(total), units)
            if len(gone):
                name, module = anatomy.name(layer, consumer), anatomy.module(layer, consumer)
                features = anatomy.unit_features(consumer, layer)[gone].ravel()
                mean = np.zeros(module.weight.shape[weight_axis(module, "input")])
                mean[features] = statistics.mean(name, "input", "sum")[features]
                written = per_feature(
                    module.weight.float() * by_input(mean, module), module, "output"
                )
                shift[name] = written.cpu().tolist()
    return replace(plan, shift=shift, origin={**plan.origin, "bias_compensation": True})


@checked(model=Model(), plan=Instance(PruningPlan), hessians=Instance(Hessians), damp=Number(0))
@torch.inference_mode(False)  # what is made there could not be trained or hashed later
@torch.no_grad()
def weight_compensated(
    model: PreTrainedModel, plan: PruningPlan, hessians: Hessians, damp: float = 0.01
) -> PreTrainedModel:
    """A copy whose kept o/down columns make up for the removed ones: the OBS weight update.

    ``W_kept ← W H[:, kept] (H[kept, kept])⁻¹``, the least-squares optimum: where Optimal Brain
    Surgeon ends that removes one column after another, in any order, and lets all others make up
    for it. SparseGPT's update is weaker: it goes from left to right once, and only the columns to
    the right of a removed one make up for it. For ``masked(copy, plan)`` or ``shrink(copy, plan)``.
    The Hessians are the dense model's for all layers; nothing follows the pruned prefix.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Left as it is.
    plan : PruningPlan
        Which units leave.
    hessians : Hessians
        Of the projections that read the units (o/down), of this model.
    damp : float
        Share of the mean diagonal that is added to it.

    Raises
    ------
    ValueError
        If plan or Hessians do not fit the model, or one of them lacks a layer.
    """
    hessians.require(model)
    plan.require(model)
    updated = copy.deepcopy(model)
    for (name, side), stay in plan.kept_features(Anatomy(updated)).items():
        if side == "output":
            continue
        module, axis = (
            updated.get_submodule(name),
            weight_axis(updated.get_submodule(name), "input"),
        )
        matrix = hessians.matrices.get(name)
        if matrix is None or matrix.shape != (len(stay), len(stay)):
            raise ValueError(
                f"there is no Hessian of {name} of {len(stay)} features; collect_hessians with it"
            )
        try:
            damped, _ = damped_inverse(matrix, damp)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        kept = torch.as_tensor(np.flatnonzero(stay), device=damped.device)
        weight = module.weight.to(damped).movedim(axis, 1)  # [output, input]
        W_refit = refit(weight, damped, kept)  # [output, kept]
        module.weight.index_copy_(axis, kept, W_refit.movedim(1, axis).to(module.weight))
    return updated
