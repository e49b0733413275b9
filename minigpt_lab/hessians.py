"""Second moments of what linear layers read: the Hessian of the error of their outputs.

For ``min ‖WX - W'X‖²`` all rows of *W* share ``H = X Xᵀ`` (up to a factor; Optimal Brain Surgeon,
SparseGPT, arXiv 2301.00774). Here it is the mean over tokens, without the factor 2.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from .assets import nearest
from .domains import unpadded
from .families import Anatomy, weight_axis
from .guards import hooked, restoring
from .plan import PruningPlan
from .runtime import check_token_ids, fingerprint, inference, require_weights


@dataclass(frozen=True)
class Hessians:
    """``H = X Xᵀ / N`` of some linear layers' inputs.

    Parameters
    ----------
    matrices : dict
        Linear layer's name to ``[input, input]``.
    model_hash : str
        `fingerprint` of the model that read the tokens.
    n_tokens : int
        N.
    """

    matrices: dict[str, torch.Tensor]
    model_hash: str
    n_tokens: int

    def require(self, model: PreTrainedModel) -> None:
        """Refuse another model than the one measured.

        Raises
        ------
        ValueError
            If the model's weights are not those that read the tokens.
        """
        require_weights(model, self.model_hash, "these Hessians")


@restoring
def second_moments(modules: dict[str, nn.Module]) -> Iterator[dict[str, torch.Tensor]]:
    """Sums of ``x xᵀ`` over every token that enters linear layers while inside, by their names.

    Layers that read one tensor (q, k and v) share one matrix. float64, except on MPS.
    """
    sums: dict[str, torch.Tensor] = {}
    shared: dict[str, str] = {}
    last: tuple[torch.Tensor, str] | None = None

    def hook(name: str):
        def add(_module: nn.Module, args: tuple) -> None:
            nonlocal last
            if last is not None and args[0] is last[0]:
                shared[name] = last[1]
                return
            last = (args[0], name)
            x = args[0].detach().flatten(0, -2).float()
            if name not in sums:
                dtype = torch.float32 if x.device.type == "mps" else torch.float64
                sums[name] = torch.zeros(x.shape[1], x.shape[1], dtype=dtype, device=x.device)
            sums[name] += x.T @ x

        return add

    hooks = [partial(each.register_forward_pre_hook, hook(name)) for name, each in modules.items()]
    try:
        with hooked(*hooks):
            yield sums
    finally:
        sums |= {name: sums[source] for name, source in shared.items() if source in sums}


def collect_hessians(
    model: PreTrainedModel,
    batches: Iterable[dict[str, torch.Tensor]],
    names: Iterable[str],
    progress: bool = True,
) -> Hessians:
    """Second moments of the inputs of linear layers, in one pass over the dense model.

    A matrix has as many entries as features squared: for a large model take a few layers at a time.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A supported causal language model; left as it was.
    batches : iterable of dict
        Calibration tokens; padding is left out.
    names : iterable of str
        Full names of the linear layers.
    progress : bool
        Show a progress bar.

    Raises
    ------
    ValueError
        If there are no tokens, or what a layer reads is not finite.
    """
    modules = {name: model.get_submodule(name) for name in names}
    n_tokens = 0
    with inference(model), second_moments(modules) as sums:
        for ids in tqdm(unpadded(batches), desc="Hessians", unit="batch", disable=not progress):
            check_token_ids(model, ids)
            n_tokens += ids.numel()
            model.base_model(input_ids=ids.to(model.device), use_cache=False)
    for name in modules:
        if not torch.isfinite(sums[name]).all():
            raise ValueError(f"{name} has NaN or infinite values at its input: check the weights")
    matrices = {name: sums[name] / n_tokens for name in modules}
    return Hessians(matrices, fingerprint(model), n_tokens)


#: What a share of damping is a share of.
DAMPINGS = ("mean", "feature")


def damped_inverse(
    hessian: torch.Tensor, damp: float, damping: str = "mean"
) -> tuple[torch.Tensor, torch.Tensor]:
    """H with a share of its diagonal added to it, and the inverse of that.

    Features that are always zero get 1 on the diagonal. If H is not definite the share grows
    tenfold at a time, with a warning.

    Parameters
    ----------
    hessian : torch.Tensor
        ``[feature, feature]``.
    damp : float
        The share.
    damping : {"mean", "feature"}
        Of the mean of the diagonal, for every feature the same (SparseGPT, SlimGPT); or of each
        feature's own second moment, which shrinks all correlations alike and so does not depend on
        how features are scaled.

    Raises
    ------
    ValueError
        If H is not finite, an option is out of range, or no damping up to the whole diagonal is
        enough.
    """
    if not damp >= 0:
        raise ValueError(f"damp is {damp}; expected a share of the diagonal, 0 or more")
    if damping not in DAMPINGS:
        raise ValueError(f"unknown damping {damping!r}; {nearest(damping, list(DAMPINGS))}")
    if not torch.isfinite(hessian).all():
        raise ValueError("the second moment has NaN or infinite values")
    damped = (hessian + hessian.mT).div_(2)
    diagonal = damped.diagonal().clone()
    unit = diagonal.mean() if damping == "mean" else diagonal
    for share in (damp, *(10.0**power for power in range(-6, 1) if 10.0**power > damp)):
        damped.diagonal().copy_(torch.where(diagonal == 0, 1, diagonal + share * unit))
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            if share != damp:
                warnings.warn(
                    f"a second moment of {len(hessian)} features is singular at damp={damp}: "
                    f"damped by {share:g} of its diagonal; more calibration tokens help",
                    stacklevel=2,
                )
            return damped, torch.cholesky_inverse(factor)
    raise ValueError("the second moment is not positive definite, however much it is damped")


def refit(weight: torch.Tensor, hessian: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """``W H[:, kept] (H[kept, kept])⁻¹``: the kept columns' best for ``min tr((W-W') H (W-W')ᵀ)``.

    Parameters
    ----------
    weight, hessian : torch.Tensor
        ``[output, input]``, and ``[input, input]``, positive definite.
    kept : torch.Tensor
        Columns that stay.
    """
    factor = torch.linalg.cholesky(hessian[kept][:, kept])
    return torch.cholesky_solve((weight @ hessian[:, kept]).mT, factor).mT


@torch.no_grad()
def weight_compensated(
    model: PreTrainedModel, plan: PruningPlan, hessians: Hessians, damp: float = 0.01
) -> PreTrainedModel:
    """A copy whose kept o/down columns make up for the removed ones: the OBS weight update.

    ``W_kept ← W H[:, kept] (H[kept, kept])⁻¹``, the least-squares optimum that removing one column
    after another with SparseGPT's update ends in. For ``masked(copy, plan)`` or ``shrink(copy,
    plan)``. The Hessians are the dense model's for all layers; nothing follows the pruned prefix.

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
    anatomy = Anatomy(updated)
    for site, layers in plan.keep.items():
        for layer, units in enumerate(layers):
            total, consumer = plan.units[site][layer], anatomy.family.consumes[site]
            if len(units) == total:
                continue
            name, module = anatomy.name(layer, consumer), anatomy.module(layer, consumer)
            if name not in hessians.matrices:
                raise ValueError(f"there is no Hessian of {name}; collect_hessians with it")
            found, _ = damped_inverse(hessians.matrices[name], damp)
            kept = torch.as_tensor(
                anatomy.positions(consumer, units, total, layer=layer), device=found.device
            )
            axis = weight_axis(module, "input")
            weight = module.weight.to(found).movedim(axis, 1)  # [output, input]
            solution = refit(weight, found, kept)
            module.weight.index_copy_(axis, kept, solution.movedim(1, axis).to(module.weight))
    return updated
