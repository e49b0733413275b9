"""Which inputs of a linear layer leave, and what the weights that stay become (OBS, by units).

``min ‖WX - W'X‖²`` with whole groups of columns of W' zero. All rows share the second moment
``H = X Xᵀ / N`` of what the layer reads (see `hessians`); removing columns *P* costs
``tr(W_P ([H⁻¹]_PP)⁻¹ W_Pᵀ)`` and the rest becomes ``W - W_P ([H⁻¹]_PP)⁻¹ [H⁻¹]_P``: the closed form
of SlimGPT's column loop (arXiv 2412.18110, algorithm 1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from ..calibration import Indefinite, damped_inverse, refit
from ..checks import Function, Integer, ListOf, OneOf, safe_contextmanager

Schedule = Callable[[int, int], int]  # (removed so far, to remove) -> size of the next group


def halving(largest: int = 1024, smallest: int = 8) -> Schedule:
    """Groups of half of what is still to go, between two sizes.

    SlimGPT's dynamic group size starts large, "such as 1024", and ends at about 8; how it gets from
    one to the other is not published, halving is our choice.
    """
    return lambda removed, total: min(max((total - removed) // 2, smallest), largest)


def released(removed: int, total: int) -> int:
    """Group sizes of SlimGPT's released code: up to 1024 at first, soon 64.

    There ``block`` starts at ``(total - 512) // 2``, shrinks to ``(block - 512) // 2`` with every
    group, and a group has ``min(max(block, 64), 1024)`` columns.
    """
    block, done = (total - 512) // 2, 0
    while (size := min(max(block, 64), 1024, total - done)) and done + size <= removed:
        block, done = (block - 512) // 2, done + size
    return size


#: How many channels leave at a time: SlimGPT's description, its code, its ablation, one by one.
SCHEDULES: dict[str, Schedule] = {
    "dynamic": halving(),
    "released": released,
    "constant": lambda removed, total: 128,
    "single": lambda removed, total: 1,
}


def group_schedule(schedule: str | int | Schedule) -> Schedule:
    """A schedule by its name, from a constant size, or a function whose sizes are checked.

    Raises
    ------
    ValueError
        If the name is unknown, or a size is no whole number of at least 1.
    """
    if isinstance(schedule, str):
        rule = SCHEDULES[OneOf(SCHEDULES)("schedule", schedule)]
    elif callable(schedule):
        rule = schedule
    else:
        expected = Integer(1) | OneOf(SCHEDULES) | Function()
        size = expected("schedule", schedule)
        rule = lambda removed, total: size  # noqa: E731

    def checked_size(removed: int, total: int) -> int:
        called = f"schedule({removed}, {total})"
        return Integer(1)(called, rule(removed, total))

    return checked_size


def exact_error(weight: torch.Tensor, inverse: torch.Tensor, units: torch.Tensor) -> torch.Tensor:
    """``tr(W_g ([H⁻¹]_gg)⁻¹ W_gᵀ)``: what removing unit *g* costs once the rest has made up for it.

    Parameters
    ----------
    weight : torch.Tensor
        ``[output, input]``.
    inverse : torch.Tensor
        H⁻¹ ``[input, input]``.
    units : torch.Tensor
        Columns of every unit ``[unit, feature]``.
    """
    blocks, columns = _of_units(weight, inverse, units)
    root = torch.linalg.cholesky(blocks)
    half = torch.linalg.solve_triangular(root, columns.mT, upper=False)
    return half.square().sum((1, 2))


def slimgpt_error(weight: torch.Tensor, inverse: torch.Tensor, units: torch.Tensor) -> torch.Tensor:
    """``Σ_ij W_ij² / U_jj²`` with U the grouped Cholesky factor of ``[H⁻¹]_gg`` (algorithm 1).

    Weights are not updated inside a unit while it is scored, so this is the exact error only for
    units of one column.
    """
    blocks, columns = _of_units(weight, inverse, units)
    pivots = torch.linalg.cholesky(blocks).diagonal(dim1=1, dim2=2)
    return (columns.square().sum(1) / pivots.square()).sum(1)


def diagonal_error(
    weight: torch.Tensor, inverse: torch.Tensor, units: torch.Tensor
) -> torch.Tensor:
    """``Σ_ij W_ij² / [H⁻¹]_jj``: SlimGPT's ablation without the grouped Cholesky."""
    return (weight.square().sum(0) / inverse.diagonal())[units].sum(1)


def _of_units(
    weight: torch.Tensor, inverse: torch.Tensor, units: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks of H⁻¹ ``[unit, feature, feature]`` and columns of W ``[unit, output, feature]``."""
    return inverse[units[:, :, None], units[:, None, :]], weight[:, units].movedim(1, 0)


#: How the error of removing one unit is estimated.
ERRORS = {"exact": exact_error, "slimgpt": slimgpt_error, "diag": diagonal_error}


@dataclass(frozen=True)
class Elimination:
    """What is left of a linear layer's input.

    Parameters
    ----------
    kept : list of int
        Units that stay, ascending.
    order : list of int
        Units that leave, in the order in which they did.
    weight : torch.Tensor
        ``[output, feature]`` of the kept units' features, unit by unit.
    loss : float
        ``tr((W - W') H (W - W')ᵀ)`` with the undamped H: squared error of the outputs per token.
    scale : float
        ``tr(W H Wᵀ)``: the loss of removing everything.
    """

    kept: list[int]
    order: list[int]
    weight: torch.Tensor
    loss: float
    scale: float

    @property
    def relative_loss(self) -> float:
        """Loss over `scale`; 0 where there was nothing to lose."""
        return self.loss / self.scale if self.scale else 0.0


def eliminate(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    units: torch.Tensor,
    count: int,
    error: str = "exact",
    schedule: str | int | Schedule = "dynamic",
    damp: float = 0.3,
    damping: str = "feature",
    compensate: bool = True,
) -> Elimination:
    """Remove units one group after another, each time the ones that cost least, and refit the rest.

    H is inverted once; after every group its inverse is down-dated. Units that read nothing (all
    zero) leave first, for free.

    Parameters
    ----------
    weight : torch.Tensor
        ``[output, input]``; its dtype and device are those of the computation.
    hessian : torch.Tensor
        Second moment ``[input, input]``, undamped.
    units : torch.Tensor
        Columns of every unit ``[unit, feature]``.
    count : int
        Units to remove; less than all.
    error : {"exact", "slimgpt", "diag"}
        Key of `ERRORS`. For units of one column they agree.
    schedule : str, int or callable
        Key of `SCHEDULES`, a constant group size, or ``(removed so far, to remove)`` to the next
        one's size.
    damp, damping : float, str
        See `damped_inverse`; more if the matrix is not definite.
    compensate : bool
        Whether the weights that stay make up for those that leave (if not, units are still chosen
        as if they did).

    Raises
    ------
    ValueError
        If an option is unknown, the count is out of range, or H is not finite.
    """
    given = (weight, hessian, units, [count], error, schedule, damp, damping, compensate)
    return eliminations(*given)[0]


def eliminations(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    units: torch.Tensor,
    counts: Sequence[int],
    error: str = "exact",
    schedule: str | int | Schedule = "dynamic",
    damp: float = 0.3,
    damping: str = "feature",
    compensate: bool = True,
) -> list[Elimination]:
    """`eliminate` for several counts in one run: what leaves for one leaves for the next too.

    Parameters
    ----------
    counts : sequence of int
        Units to remove, ascending. The schedule begins anew at each of them.
    weight, hessian, units, error, schedule, damp, damping, compensate
        As for `eliminate`.

    Raises
    ------
    ValueError
        As `eliminate` does; if the counts do not ascend.
    """
    OneOf(ERRORS)("error", error)
    counts = ListOf(Integer())("counts", counts)
    for count in counts:
        if not 0 <= count < len(units):
            raise ValueError(f"{count} of {len(units)} units are to leave; at least one must stay")
    if not counts or list(counts) != sorted(set(counts)):
        raise ValueError(f"counts are {[*counts]}; expected at least one, ascending")
    sizes = group_schedule(schedule)
    scale = _quadratic(weight, hessian)
    alive = (hessian.diagonal() > 0)[units].any(1)
    dead = torch.nonzero(~alive).ravel()[: counts[-1]].tolist()
    order = list(dead)
    left = torch.tensor(_without(dead, len(units)), device=units.device)
    columns = units[left].ravel()
    now = weight[:, columns]
    full, inverse = damped_inverse(hessian[columns][:, columns], damp, damping)
    added = full.diagonal() - hessian.diagonal()[columns]
    places = torch.arange(len(columns), device=columns.device)
    feature = torch.arange(units.shape[1], device=units.device)
    found = []
    for count in counts:
        if count <= len(dead):
            rest = _without(dead[:count], len(units))
            short = weight[:, units[rest].ravel()]
            found.append(Elimination(rest, dead[:count], short, 0.0, scale))
            continue
        start = len(order)
        while len(order) < count:
            size = min(sizes(len(order) - start, count - start), count - len(order))
            blocks = torch.arange(len(left), device=units.device)[:, None] * len(feature) + feature
            errors = ERRORS[error](now, inverse, blocks)
            gone = torch.zeros(len(left), dtype=torch.bool, device=units.device)
            lowest = errors.argsort(stable=True)[:size]
            gone[lowest] = True
            order += left[lowest].tolist()
            out = gone.repeat_interleave(len(feature))
            root = torch.linalg.cholesky(inverse[out][:, out])
            removed = torch.linalg.solve_triangular(root, now[:, out].mT, upper=False)
            reach = torch.linalg.solve_triangular(root, inverse[out][:, ~out], upper=False)
            now = now[:, ~out] - removed.mT @ reach
            inverse = inverse[~out][:, ~out] - reach.mT @ reach
            left, places = left[~gone], places[~out]
        if compensate:  # once more from the whole, or rounding would add up
            short = refit(weight[:, columns], full, places)
        else:
            short = weight[:, columns[places]]
        if not torch.isfinite(short).all():
            raise Indefinite("the weights that stay are not finite")
        lost = weight[:, columns].clone()
        lost[:, places] -= short
        loss = _quadratic(lost, full) - float((lost.square().sum(0) * added).sum())
        found.append(Elimination(left.tolist(), order[:count], short, max(loss, 0.0), scale))
    return found


def _without(gone: Sequence[int], total: int) -> list[int]:
    return sorted(set(range(total)) - set(gone))


def _quadratic(weight: torch.Tensor, hessian: torch.Tensor) -> float:
    return float(((weight @ hessian) * weight).sum())


@safe_contextmanager
def full_precision() -> Iterator[None]:
    """float32 products in float32 while inside (CUDA's TF32 keeps ten bits of each factor)."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
