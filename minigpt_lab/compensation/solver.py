"""Prune one projection of one layer and update its remaining weights."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import nn

from ..calibration import DAMPING_MODES, Indefinite, LayerRunner, Moments
from ..checks import Flag, Number, OneOf, check_fields, invalid, suggest
from ..models import Anatomy, add_bias, rebuild_layer, weight_axis
from .obs import BLOCK_SIZE, SALIENCIES, Elimination, eliminate_levels

BIASES = ["refit", "add", "keep"]


@dataclass(frozen=True)
class Solver:
    """Settings of the optimal brain surgeon; see `eliminate`.

    Parameters
    ----------
    saliency : {"exact", "slimgpt", "diag"}
        Estimate of the loss of removing one head: the exact one, SlimGPT's, or that of SlimGPT's
        ablation. For channels, which are single columns, all three agree.
    block_size : int or "dynamic"
        Channels removed between two updates of the weights. Heads are removed one at a time.
    damping, damping_mode : float, {"feature", "mean"}
        Share of its diagonal that is added to the second moment, see `damped_inverse`. SparseGPT
        and SlimGPT's code take 0.01 of the diagonal's mean (``damping_mode="mean"``). With a few
        thousand calibration tokens that overfits: to some degree on text of their domain, far more
        on other text.
    bias : {"refit", "add", "keep"}
        How the projection's bias compensates for the mean of the removed inputs: ``"refit"``
        updates a bias that exists, ``"add"`` also adds one where there is none, ``"keep"`` changes
        none.
    compensate : bool
        Whether weights and biases are updated at all.
    dtype : torch.dtype
        float32 or float64, for second moments and all that is computed from them.
    """

    saliency: str = "exact"
    block_size: str | int = "dynamic"
    damping: float = 0.3
    damping_mode: str = "feature"
    bias: str = "refit"
    compensate: bool = True
    dtype: torch.dtype = torch.float32

    def __post_init__(self):
        check_fields(
            self,
            saliency=OneOf(SALIENCIES),
            block_size=BLOCK_SIZE,
            damping=Number(0),
            damping_mode=OneOf(DAMPING_MODES),
            bias=OneOf(BIASES),
            compensate=Flag(),
        )
        if self.dtype not in (torch.float32, torch.float64):
            raise invalid("dtype", self.dtype, "torch.float32 or torch.float64")

    @classmethod
    def from_options(cls, options: Mapping[str, Any], others: Iterable[str]) -> Solver:
        """Settings from a function's ``**options``.

        The error for an unknown option suggests the nearest of the settings and of `others`, the
        function's other arguments.
        """
        known = [field.name for field in fields(cls)]
        for name in options:
            if name not in known:
                raise ValueError(f"unknown option {name!r}; {suggest(name, [*known, *others])}")
        return cls(**options)

    def to_dict(self) -> dict[str, object]:
        """The settings as plain data."""
        return {**asdict(self), "dtype": str(self.dtype).removeprefix("torch.")}

    def updates_bias(self, module: nn.Module) -> bool:
        """Whether a projection's bias compensates for the mean of the removed inputs."""
        has_bias = self.bias == "add" or (self.bias == "refit" and module.bias is not None)
        return self.compensate and has_bias


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
    units : torch.Tensor
        Columns of every unit ``[unit, feature]``.
    """

    name: str
    layer: int
    site: str
    W: torch.Tensor
    H: torch.Tensor
    mean: torch.Tensor
    units: torch.Tensor

    def columns(self, units: Sequence[int]) -> torch.Tensor:
        """Columns of some units ``[unit · feature]``, unit by unit."""
        return self.units[units].ravel()


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
    for X in runner.inputs(part_of(site)):  # [batch, token, in]
        moments.add(X)
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
    units = torch.as_tensor(anatomy.unit_features(reader, layer), device=H.device)
    return Problem(name, layer, site, W, H, moments.mean, units)


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
    block_size = solver.block_size if problem.site == "ffn" else 1
    settings = (solver.saliency, block_size, solver.damping, solver.damping_mode, solver.compensate)
    W, H, units = problem.W, problem.H, problem.units
    # MPS has no float64.
    dtypes = [W.dtype] if W.device.type == "mps" else [W.dtype, torch.float64]
    for dtype in dict.fromkeys(dtypes):
        try:
            levels = eliminate_levels(W.to(dtype), H.to(dtype), units, counts, *settings)
        except (Indefinite, torch.linalg.LinAlgError) as error:
            failure = error
        else:
            return [replace(level, W=level.W.to(W.dtype)) for level in levels]
    raise ValueError(
        f"{problem.name} cannot be solved for ({failure}): give more calibration tokens, or a "
        "larger damping"
    ) from failure


def bias_update(problem: Problem, elimination: Elimination) -> torch.Tensor:
    """``W E[x] - W' E[x_kept]``: mean output that the updated weights lack ``[out]``."""
    columns = problem.columns(elimination.kept)
    return problem.W @ problem.mean - elimination.W @ problem.mean[columns]


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
