"""Prune one projection of one layer and update its remaining weights."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ..calibration import Indefinite, LayerRunner, Moments, damped_inverse
from ..checks import InvalidArgument
from ..models import Anatomy, add_bias, rebuild_layer, weight_axis
from ..store import Shards
from .obs import Elimination, eliminate_levels
from .solver import Solver


@dataclass(frozen=True)
class Problem:
    """One projection (o or down) whose inputs are to be pruned.

    Parameters
    ----------
    name : str
        Full name of the projection.
    layer, site : int, str
        Its layer, and the site whose units it reads.
    W : torch.Tensor
        Weight ``[out, in]``, in the solver's dtype.
    H : torch.Tensor
        Second moment of the input ``[in, in]``; the covariance if the bias is updated.
    mean : torch.Tensor
        Mean of the input ``[in]``.
    mean_output : torch.Tensor
        Mean of what the projection should write, without its bias ``[out]``.
    unit_columns : torch.Tensor
        Columns of every unit ``[unit, feature]``.
    """

    name: str
    layer: int
    site: str
    W: torch.Tensor
    H: torch.Tensor
    mean: torch.Tensor
    mean_output: torch.Tensor
    unit_columns: torch.Tensor

    def columns(self, units: Sequence[int]) -> torch.Tensor:
        """Columns of some units ``[unit · feature]``, unit by unit."""
        return self.unit_columns[units].ravel()


def part_of(site: str) -> str:
    """``"attention"`` or ``"ffn"``: the part of a layer that a site prunes."""
    return "ffn" if site == "ffn" else "attention"


def read_problem(
    anatomy: Anatomy, runner: LayerRunner, layer: int, site: str, solver: Solver
) -> Problem:
    """The weight of a site's projection, and the second moment ``H`` of its input over all windows.

    If the bias is updated too, H is the covariance: the best bias makes up for all means, so that
    ``min_b E‖W x - W' x - b‖² = tr((W - W') Cov(x) (W - W')ᵀ)``.

    Raises
    ------
    ValueError
        If the input or the weight is not finite; the projection is named.
    """
    reader = anatomy.family.consumes[site]
    name, module = anatomy.name(layer, reader), anatomy.module(layer, reader)
    # 1. Second moment of the projection's input.
    moments = Moments(solver.dtype)
    for X, weight in zip(runner.inputs(part_of(site)), runner.weights, strict=True):
        moments.add(X, weight)  # X [batch, token, in]
    H = moments.covariance() if solver.updates_bias(module) else moments.second()
    if not torch.isfinite(H).all():
        raise ValueError(f"{name} reads NaN or infinite values: check the weights before it")
    if not torch.isfinite(module.weight).all():
        raise ValueError(f"{name} has NaN or infinite weights: check the model")
    if moments.count < len(H):
        warnings.warn(
            f"{moments.count} calibration tokens for {len(H)} features: the remaining weights "
            "depend mostly on the damping; give more tokens",
            stacklevel=2,
        )
    # 2. The weight, and the columns of every unit.
    W = module.weight.detach().to(H.dtype).movedim(weight_axis(module, "input"), 1)  # [out, in]
    unit_columns = torch.as_tensor(anatomy.unit_features(reader, layer), device=H.device)
    mean = moments.mean
    return Problem(name, layer, site, W, H, mean, W @ mean, unit_columns)


def aim_at_stream(
    problem: Problem, runner: LayerRunner, targets: Shards, share: float, solver: Solver
) -> Problem:
    """The same projection, which shall also make up for what the layers before it have lost.

    With m the residual stream before the projection adds W x to it, and h the dense model's behind
    it (the asymmetric calibration of GPTAQ, arXiv 2504.02692, for pruning):

        R = h - (m + W x),   C = E[R xᵀ],   W ← W + α C (H + λ diag H)⁻¹ .

    Parameters
    ----------
    problem : Problem
        From `read_problem`; the runner still keeps the inputs that were read for it.
    targets : Shards
        h ``[batch, token, feature]``, by window.
    share : float
        α.
    """
    W, H, site = problem.W, problem.H, part_of(problem.site)
    C, mean, total = torch.zeros_like(W), torch.zeros_like(problem.mean_output), 0.0
    centre = problem.mean if solver.updates_bias(runner.readers[site]) else 0.0  # as that of H
    for window, weight in enumerate(runner.weights):
        x = runner.read[site][window]
        stream = runner.residual_stream(window, site)  # m + W x
        runner.read[site][window] = x
        R = (targets[window].to(W) - stream.to(W)).flatten(0, -2)  # [token, out]
        C.addmm_(R.mT, x.to(W).flatten(0, -2) - centre, alpha=weight)  # x [token, in]
        mean += weight * R.sum(0)
        total += weight * len(R)
    _, H_inv = damped_inverse(H, solver.damping, solver.damping_mode)
    W = W + share / total * C @ H_inv
    return replace(problem, W=W, mean_output=problem.mean_output + share / total * mean)


def solve(problem: Problem, count: int, solver: Solver) -> Elimination:
    """`eliminate` with a solver's settings."""
    return solve_levels(problem, [count], solver)[0]


def solve_levels(problem: Problem, counts: Sequence[int], solver: Solver) -> list[Elimination]:
    """`eliminate_levels` with a solver's settings; again in float64 if it fails in float32.

    Raises
    ------
    ValueError
        If it fails in float64 too; the projection is named.
    """
    if problem.site != "ffn":
        solver = replace(solver, block_size=1)  # heads are removed one at a time
    W, H = problem.W, problem.H
    # MPS has no float64.
    dtypes = [W.dtype] if W.device.type == "mps" else [W.dtype, torch.float64]
    for dtype in dict.fromkeys(dtypes):
        try:
            levels = eliminate_levels(
                W.to(dtype), H.to(dtype), problem.unit_columns, counts, solver
            )
        except (Indefinite, torch.linalg.LinAlgError) as error:
            failure = error
        else:
            return [replace(level, W=level.W.to(W.dtype)) for level in levels]
    raise ValueError(
        f"{problem.name} cannot be solved for ({failure}): give more calibration tokens, or a "
        "larger damping"
    ) from failure


def require_plain_sums(anatomy: Anatomy, instead: str) -> None:
    """Refuse a model where a norm stands between its projections and the residual stream.

    Parameters
    ----------
    instead : str
        What the user can do.
    """
    layer, config = anatomy.layers[0], anatomy.model.config
    if hasattr(layer, "post_feedforward_layernorm"):
        what = "a norm behind the FFN"
    elif not getattr(config, "do_layer_norm_before", True):
        what = "a norm of the residual stream in every layer (do_layer_norm_before=False)"
    elif getattr(config, "apply_residual_connection_post_layernorm", False):
        what = "a residual stream of norms (apply_residual_connection_post_layernorm=True)"
    else:
        return
    raise InvalidArgument(
        f"the model has {what}, so that the stream is no sum of what its projections write; "
        f"{instead}"
    )


def bias_update(problem: Problem, elimination: Elimination) -> torch.Tensor:
    """``W E[x] - W' E[x_kept]``: mean output that the updated weights lack ``[out]``."""
    columns = problem.columns(elimination.kept)
    return problem.mean_output - elimination.W @ problem.mean[columns]


def apply_elimination(
    anatomy: Anatomy,
    runner: LayerRunner,
    problem: Problem,
    elimination: Elimination,
    solver: Solver,
) -> None:
    """Remove the units from the layer, in place, and from the inputs that `runner` has cached."""
    layer, site = problem.layer, problem.site
    module = anatomy.module(layer, anatomy.family.consumes[site])
    axis, columns = weight_axis(module, "input"), problem.columns(elimination.kept)
    # 1. Update the bias and the kept columns of the projection.
    if solver.updates_bias(module):
        if module.bias is None:
            add_bias(module)
        module.bias += bias_update(problem, elimination).to(module.bias)
    module.weight.index_copy_(axis, columns, elimination.W.movedim(1, axis).to(module.weight))
    # 2. Shrink it and the projections that produce the units.
    rebuild_layer(anatomy, site, layer, elimination.kept)
    # 3. Shrink its cached inputs, from which the layer's pass continues.
    runner.keep_columns(part_of(site), columns.sort().values)
    if site == "attention":
        runner.keep_heads(elimination.kept)
