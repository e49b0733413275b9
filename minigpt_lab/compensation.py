"""Taking units out of one layer while the weights that stay make up for them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from numbers import Real

import torch
from torch import nn

from .assets import nearest
from .biases import give_bias
from .elimination import ERRORS, Elimination, Schedule, eliminations, group_schedule
from .families import Anatomy, weight_axis
from .hessians import DAMPINGS
from .layerwise import LayerPass

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
        if not isinstance(self.damp, Real) or not 0 <= self.damp < math.inf:
            raise ValueError(f"damp is {self.damp!r}; expected a share, 0 or more (0.3 is 30 %)")
        for name, known in (("error", ERRORS), ("damping", DAMPINGS), ("bias", BIASES)):
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"unknown {name} {value!r}; {nearest(str(value), list(known))}")
        if not isinstance(self.heads_per_round, int) or self.heads_per_round < 1:
            raise ValueError(f"heads_per_round is {self.heads_per_round!r}; expected 1 or more")
        group_schedule(self.schedule)
        if self.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"dtype is {self.dtype!r}; expected torch.float32 or torch.float64")

    def facts(self) -> dict[str, object]:
        """The settings as plain data."""
        schedule = getattr(self.schedule, "__name__", self.schedule)
        return {**asdict(self), "schedule": schedule, "dtype": str(self.dtype)[6:]}

    def refits_bias(self, module: nn.Module) -> bool:
        """Whether a projection's bias makes up for the mean of what leaves."""
        has = self.bias == "refit" and module.bias is not None
        return self.compensate and (self.bias == "add" or has)


class Moments:
    """First and second moments of what a projection reads, over tokens."""

    def __init__(self, features: int, device: torch.device, dtype: torch.dtype):
        self.square = torch.zeros(features, features, device=device, dtype=dtype)
        self.sum = torch.zeros(features, device=device, dtype=dtype)
        self.count = 0

    def add(self, states: torch.Tensor) -> None:
        """Count in ``[…, feature]``."""
        x = states.flatten(0, -2).to(self.square.dtype)
        self.square.addmm_(x.T, x)
        self.sum += x.sum(0)
        self.count += len(x)


@dataclass(frozen=True)
class Problem:
    """One projection whose inputs are to leave: its weight, what it reads, and the units in that.

    Parameters
    ----------
    weight : torch.Tensor
        ``[output, input]``, in the solver's dtype.
    hessian : torch.Tensor
        Second moment of the input ``[input, input]``; around the mean if a bias makes up for it.
    mean : torch.Tensor
        Of the input.
    units : torch.Tensor
        Columns of every unit ``[unit, feature]``.
    """

    weight: torch.Tensor
    hessian: torch.Tensor
    mean: torch.Tensor
    units: torch.Tensor


def part_of(site: str) -> str:
    """The half of a layer that a site is in."""
    return "ffn" if site == "ffn" else "attention"


def problem(
    anatomy: Anatomy, one: LayerPass, layer: int, site: str, total: int, options: Solver
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
    moments = Moments(module.weight.shape[axis], module.weight.device, options.dtype)
    for states in one.inputs(part_of(site)):
        moments.add(states)
    hessian, mean = moments.square.div_(moments.count), moments.sum / moments.count
    if not torch.isfinite(hessian).all():
        raise ValueError(f"{name} reads NaN or infinite values: check the weights before it")
    if moments.count < len(mean):
        warnings.warn(
            f"{moments.count} calibration tokens for {len(mean)} features: the weights that stay "
            "are mostly damped, not fitted; give more tokens",
            stacklevel=2,
        )
    if options.refits_bias(module):
        hessian -= torch.outer(mean, mean)  # the bias takes care of the mean
    if not torch.isfinite(module.weight).all():
        raise ValueError(f"{name} has NaN or infinite weights: check the model")
    places = anatomy.unit_positions(reader, total, layer=layer)
    weight = module.weight.detach().to(hessian.dtype).movedim(axis, 1)
    return Problem(weight, hessian, mean, torch.as_tensor(places, device=hessian.device))


def solve(given: Problem, site: str, count: int, options: Solver) -> Elimination:
    """`eliminate` with a solver's settings."""
    return solve_levels(given, site, [count], options)[0]


def solve_levels(
    given: Problem, site: str, counts: Sequence[int], options: Solver
) -> list[Elimination]:
    """`eliminations` with a solver's settings."""
    schedule = options.schedule if site == "ffn" else options.heads_per_round
    rule = (options.error, schedule, options.damp, options.damping, options.compensate)
    return eliminations(given.weight, given.hessian, given.units, counts, *rule)


def bias_shift(given: Problem, found: Elimination) -> torch.Tensor:
    """What the mean of the units that leave gave every output ``[output]``."""
    columns = given.units[found.kept].ravel()
    return given.weight @ given.mean - found.weight @ given.mean[columns]


def carry_out(
    anatomy: Anatomy,
    one: LayerPass,
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
            give_bias(module)
        module.bias += bias_shift(given, found).to(module.bias)
    module.weight.index_copy_(axis, columns, found.weight.movedim(1, axis).to(module.weight))
    anatomy.rebuild(site, layer, found.kept)
    one.keep_columns(part_of(site), columns.sort().values)
