"""Taking units out of one layer while the weights that stay make up for them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import nn

from ..calibration import DAMPING_MODES, Indefinite, LayerRunner, Moments
from ..checks import Flag, Integer, Number, OneOf, check_fields, invalid, to_python
from ..models import Anatomy, add_bias, rebuild_layer, weight_axis
from .obs import ERRORS, Elimination, Schedule, eliminations, group_schedule

BIASES = ["refit", "add", "keep"]


@dataclass(frozen=True)
class Solver:
    """How one projection's columns are chosen and the rest refitted; see `eliminate`.

    Parameters
    ----------
    error : {"exact", "slimgpt", "diag"}
        How the error of removing one head is estimated (of channels they agree): exactly, as the
        paper does, or as in its ablation.
    heads_per_round : int
        Heads (or key/value groups) that leave between two updates.
    schedule : str, int or callable
        How many channels leave between two updates.
    damp, damping : float, str
        Share of the diagonal that is added to the second moment, see `damped_inverse`. SparseGPT
        and SlimGPT's code take 0.01 of its mean (``damping="mean"``); that overfits a few thousand
        calibration tokens, inside their domain and far more outside.
    bias : {"refit", "add", "keep"}
        Whether a projection's bias makes up for the mean of what leaves: where there is one, one
        added where there is none, or not.
    compensate : bool
        Whether weights and biases make up at all.
    dtype : torch.dtype
        Of second moments and what is done to them: float32 or float64.
    """

    error: str = "exact"
    heads_per_round: int = 1
    schedule: str | int | Schedule = "dynamic"
    damp: float = 0.3
    damping: str = "feature"
    bias: str = "refit"
    compensate: bool = True
    dtype: torch.dtype = torch.float32

    def __post_init__(self):
        check_fields(
            self,
            error=OneOf(ERRORS),
            heads_per_round=Integer(1),
            damp=Number(0),
            damping=OneOf(DAMPING_MODES),
            bias=OneOf(BIASES),
            compensate=Flag(),
        )
        object.__setattr__(self, "schedule", to_python(self.schedule))
        group_schedule(self.schedule)
        if self.dtype not in (torch.float32, torch.float64):
            expected = "torch.float32 or torch.float64"
            raise invalid("dtype", self.dtype, expected)

    def facts(self) -> dict[str, object]:
        """The settings as plain data."""
        schedule = self.schedule
        if callable(schedule):
            schedule = getattr(schedule, "__name__", "own")
        return {**asdict(self), "schedule": schedule, "dtype": str(self.dtype)[6:]}

    def refits_bias(self, module: nn.Module) -> bool:
        """Whether a projection's bias makes up for the mean of what leaves."""
        has = self.bias == "refit" and module.bias is not None
        return self.compensate and (self.bias == "add" or has)


@dataclass(frozen=True)
class Problem:
    """One projection whose inputs are to leave: its weight, what it reads, and the units in that.

    Parameters
    ----------
    name : str
        Of the projection.
    weight : torch.Tensor
        ``[output, input]``, in the solver's dtype.
    hessian : torch.Tensor
        Second moment of the input ``[input, input]``; around the mean if a bias makes up for it.
    mean : torch.Tensor
        Of the input.
    units : torch.Tensor
        Columns of every unit ``[unit, feature]``.
    """

    name: str
    weight: torch.Tensor
    hessian: torch.Tensor
    mean: torch.Tensor
    units: torch.Tensor


def part_of(site: str) -> str:
    """The half of a layer that a site is in."""
    return "ffn" if site == "ffn" else "attention"


def problem(
    anatomy: Anatomy, one: LayerRunner, layer: int, site: str, total: int, options: Solver
) -> Problem:
    """What a site's projection reads, over all windows.

    Raises
    ------
    ValueError
        If that, or its weight, is not finite; the projection is named.
    """
    reader = anatomy.family.consumes[site]
    name, module = anatomy.name(layer, reader), anatomy.module(layer, reader)
    axis = weight_axis(module, "input")
    moments = Moments(options.dtype)
    for states in one.inputs(part_of(site)):
        moments.add(states)
    # around the mean if the bias takes care of it
    hessian = moments.covariance() if options.refits_bias(module) else moments.second()
    mean = moments.mean
    if not torch.isfinite(hessian).all():
        raise ValueError(f"{name} reads NaN or infinite values: check the weights before it")
    if moments.count < len(mean):
        warnings.warn(
            f"{moments.count} calibration tokens for {len(mean)} features: the weights that stay "
            "are mostly damped, not fitted; give more tokens",
            stacklevel=2,
        )
    if not torch.isfinite(module.weight).all():
        raise ValueError(f"{name} has NaN or infinite weights: check the model")
    places = anatomy.unit_features(reader, layer)
    weight = module.weight.detach().to(hessian.dtype).movedim(axis, 1)
    return Problem(name, weight, hessian, mean, torch.as_tensor(places, device=hessian.device))


def solve(given: Problem, site: str, count: int, options: Solver) -> Elimination:
    """`eliminate` with a solver's settings."""
    return solve_levels(given, site, [count], options)[0]


def solve_levels(
    given: Problem, site: str, counts: Sequence[int], options: Solver
) -> list[Elimination]:
    """`eliminations` with a solver's settings; in float64 where float32 is not enough.

    Raises
    ------
    ValueError
        If that is not enough either; the projection is named.
    """
    schedule = options.schedule if site == "ffn" else options.heads_per_round
    rule = (options.error, schedule, options.damp, options.damping, options.compensate)
    stored, exact = given.weight.dtype, given.weight.device.type != "mps"
    for dtype in dict.fromkeys((stored, torch.float64) if exact else (stored,)):
        weight, hessian = given.weight.to(dtype), given.hessian.to(dtype)
        try:
            levels = eliminations(weight, hessian, given.units, counts, *rule)
        except (Indefinite, torch.linalg.LinAlgError) as error:
            failure = error
        else:
            return [replace(found, weight=found.weight.to(stored)) for found in levels]
    raise ValueError(
        f"{given.name} cannot be solved for ({failure}): give more calibration tokens, or a larger "
        "damp"
    ) from failure


def bias_shift(given: Problem, found: Elimination) -> torch.Tensor:
    """What the mean of the units that leave gave every output ``[output]``."""
    columns = given.units[found.kept].ravel()
    return given.weight @ given.mean - found.weight @ given.mean[columns]


def carry_out(
    anatomy: Anatomy,
    one: LayerRunner,
    layer: int,
    site: str,
    given: Problem,
    found: Elimination,
    options: Solver,
) -> None:
    """Take the units out of the layer, in place, and out of what is kept of its pass."""
    module = anatomy.module(layer, anatomy.family.consumes[site])
    axis, columns = weight_axis(module, "input"), given.units[found.kept].ravel()
    if options.refits_bias(module):
        if module.bias is None:
            add_bias(module)
        module.bias += bias_shift(given, found).to(module.bias)
    module.weight.index_copy_(axis, columns, found.weight.movedim(1, axis).to(module.weight))
    rebuild_layer(anatomy, site, layer, found.kept)
    one.keep_columns(part_of(site), columns.sort().values)
