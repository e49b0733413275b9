"""Unit-wise optimal brain surgeon for one linear layer.

``min ‖W X - W' X‖²`` where W' is zero in the columns of the removed units. All rows of W share the
second moment ``H = X Xᵀ / N`` of the layer's inputs (see `hessians`). Removing the columns P and
updating the remaining columns R,

    W_R ← W_R - W_P ([H⁻¹]_PP)⁻¹ [H⁻¹]_PR ,

costs ``tr(W_P ([H⁻¹]_PP)⁻¹ W_Pᵀ)``: the closed form of SlimGPT's column loop (arXiv 2412.18110,
algorithm 1).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from ..calibration import Indefinite, damped_inverse, refit
from ..checks import Instance, Integer, checked, invalid, safe_contextmanager
from .saliencies import SALIENCIES
from .solver import Solver


def next_block(block_size: str | int, removed: int, count: int) -> int:
    """Number of units to remove before the next update of the weights.

    SlimGPT's dynamic group size starts large, "such as 1024", and ends at about 8. How it shrinks
    is not published; our choice is half of the units that are still to be removed.

    Parameters
    ----------
    block_size : int or "dynamic"
        A constant size, or the shrinking one.
    removed, count : int
        Units removed so far, and units to remove in all.
    """
    remaining = count - removed
    size = block_size if isinstance(block_size, int) else min(max(remaining // 2, 8), 1024)
    return min(size, remaining)


@dataclass(frozen=True)
class Elimination:
    """A linear layer after some units of its input were removed.

    Parameters
    ----------
    kept : list of int
        Kept units, ascending.
    order : list of int
        Removed units, in the order of their removal.
    W : torch.Tensor
        Updated weight ``[out, feature]`` of the kept units' features, unit by unit.
    loss : float
        ``tr((W - W') H (W - W')ᵀ)`` with the undamped H: squared error of the outputs per token.
    scale : float
        ``tr(W H Wᵀ)``: the loss of removing everything.
    """

    kept: list[int]
    order: list[int]
    W: torch.Tensor
    loss: float
    scale: float

    @property
    def relative_loss(self) -> float:
        """``loss / scale``; 0 if the outputs were zero from the start."""
        return self.loss / self.scale if self.scale else 0.0


@checked(
    W=Instance(torch.Tensor),
    H=Instance(torch.Tensor),
    unit_columns=Instance(torch.Tensor),
    count=Integer(0),
)
def eliminate(
    W: torch.Tensor,
    H: torch.Tensor,
    unit_columns: torch.Tensor,
    *,
    count: int,
    saliency: str = "exact",
    block_size: str | int = "dynamic",
    damping: float = 0.3,
    damping_mode: str = "feature",
    compensate: bool = True,
) -> Elimination:
    """Remove the units with the lowest saliency, block by block, and update the other weights.

    H is inverted once; its inverse is updated after every block. Units whose inputs are always zero
    are removed first, at no loss.

    Parameters
    ----------
    W : torch.Tensor
        Weight ``[out, in]``; its dtype and device are those of the computation.
    H : torch.Tensor
        Second moment of the inputs ``[in, in]``, undamped.
    unit_columns : torch.Tensor
        Columns of every unit ``[unit, feature]``.
    count : int
        Units to remove. Of all, only what a bias can make up for is left.
    saliency : {"exact", "slimgpt", "diag"}
        Key of `SALIENCIES`.
    block_size : int or "dynamic"
        Units per block: constant, or shrinking, see `next_block`.
    damping, damping_mode : float, {"feature", "mean"}
        See `damped_inverse`, which increases it until the matrix is positive definite.
    compensate : bool
        Whether the result has updated weights. If not, the same units are removed, but the
        remaining weights keep their values.

    Raises
    ------
    ValueError
        If an option is unknown, shapes do not fit, the count is out of range, or H is not finite.
    """
    _require_shapes(W, H, unit_columns)
    solver = Solver(saliency, block_size, damping, damping_mode, compensate=compensate)
    return eliminate_levels(W, H, unit_columns, [count], solver)[0]


def eliminate_levels(
    W: torch.Tensor,
    H: torch.Tensor,
    unit_columns: torch.Tensor,
    counts: Sequence[int],
    solver: Solver,
) -> list[Elimination]:
    """`eliminate` for several ascending counts in one run.

    Units that are removed for one count are also removed for the next. Block sizes start anew at
    each count.
    """
    total, features = unit_columns.shape
    if not counts or [*counts] != sorted({*counts}) or counts[-1] > total:
        raise ValueError(
            f"the numbers of units to remove are {[*counts]}; expected them ascending, and at most "
            f"the {total} units that there are"
        )
    scale = quadratic_form(W, H)

    # 1. Remove dead units, whose inputs are always zero, and go on with the live units' columns.
    dead = torch.nonzero((H.diagonal() == 0)[unit_columns].all(1)).ravel()[: counts[-1]].tolist()
    order = list(dead)
    live = torch.tensor(_kept_units(dead, total), device=W.device)  # [unit]
    columns = unit_columns[live].ravel()  # [unit · feature]
    places = torch.arange(len(columns), device=W.device).reshape(-1, features)  # among `columns`

    # 2. Damp and invert H once.
    H_damped, H_inv = damped_inverse(H[columns][:, columns], solver.damping, solver.damping_mode)

    # 3. Remove block after block. W_t and H_inv shrink: they hold the columns of the live units
    #    that remain (indices into `live`), side by side.
    W_t = W[:, columns]
    remaining = torch.arange(len(live), device=W.device)
    results = []
    for count in counts:
        start = len(order)
        while len(order) < count:
            columns_t = places[: len(remaining)]  # [unit, feature]
            saliencies = SALIENCIES[solver.saliency](W_t, H_inv, columns_t)  # [unit]
            size = next_block(solver.block_size, len(order) - start, count - start)
            lowest = saliencies.argsort(stable=True)[:size]
            order += live[remaining[lowest]].tolist()
            W_t, H_inv = remove_columns(W_t, H_inv, columns_t[lowest].ravel())
            remaining = remaining[_complement(lowest, len(remaining))]

        # 4. Refit from the original weights, so that rounding errors do not add up.
        kept = _kept_units(order[:count], total)
        kept_columns = unit_columns[kept].ravel()
        W_kept = W[:, kept_columns]  # [out, unit · feature]
        if solver.compensate and count > len(dead):
            W_kept = refit(W[:, columns], H_damped, places[remaining].ravel())
        if not torch.isfinite(W_kept).all():
            raise Indefinite("the updated weights are not finite")
        loss = reconstruction_loss(W, H, W_kept, kept_columns)
        results.append(Elimination(kept, order[:count], W_kept, loss, scale))
    return results


def remove_columns(
    W: torch.Tensor, H_inv: torch.Tensor, P: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Remove columns P of the weight; update the remaining columns R and their inverse.

    ``W_R ← W_R - W_P ([H⁻¹]_PP)⁻¹ [H⁻¹]_PR`` and
    ``[H⁻¹]_RR ← [H⁻¹]_RR - [H⁻¹]_RP ([H⁻¹]_PP)⁻¹ [H⁻¹]_PR``.
    """
    R, P = _complement(P, W.shape[1]), P.sort().values
    # With [H⁻¹]_PP = L Lᵀ both products are made of L⁻¹ W_Pᵀ and L⁻¹ [H⁻¹]_PR.
    L = torch.linalg.cholesky(H_inv[P][:, P])  # [p, p]
    L_inv_W = torch.linalg.solve_triangular(L, W[:, P].mT, upper=False)  # [p, out]
    L_inv_H = torch.linalg.solve_triangular(L, H_inv[P][:, R], upper=False)  # [p, r]
    return W[:, R] - L_inv_W.mT @ L_inv_H, H_inv[R][:, R] - L_inv_H.mT @ L_inv_H


def reconstruction_loss(
    W: torch.Tensor, H: torch.Tensor, W_kept: torch.Tensor, columns: torch.Tensor
) -> float:
    """``tr((W - W') H (W - W')ᵀ)``, where W' has `W_kept` in some columns and zeros elsewhere."""
    difference = W.clone()  # W - W'
    difference[:, columns] -= W_kept
    return max(quadratic_form(difference, H), 0.0)  # rounding may make it slightly negative


def quadratic_form(W: torch.Tensor, H: torch.Tensor) -> float:
    """``tr(W H Wᵀ)``: mean squared norm of the layer's outputs."""
    return float(((W @ H) * W).sum())


def _complement(indices: torch.Tensor, total: int) -> torch.Tensor:
    """Indices from 0 to `total` - 1 that are not in `indices`, ascending."""
    mask = torch.ones(total, dtype=torch.bool, device=indices.device)
    mask[indices] = False
    return mask.nonzero().ravel()


def _kept_units(removed: Sequence[int], total: int) -> list[int]:
    """Units from 0 to `total` - 1 that were not removed, ascending."""
    return sorted(set(range(total)) - set(removed))


def _require_shapes(W: torch.Tensor, H: torch.Tensor, unit_columns: torch.Tensor) -> None:
    """Refuse arguments of `eliminate` whose shapes or dtypes do not fit together."""
    if W.ndim != 2 or not W.is_floating_point():
        raise invalid("W", W, "a matrix of floating-point numbers [out, in]")
    width = W.shape[1]
    if H.shape != (width, width) or H.dtype != W.dtype:
        raise invalid("H", H, f"a matrix [{width}, {width}] of W's type {W.dtype}")
    is_table = unit_columns.ndim == 2 and unit_columns.dtype == torch.int64 and unit_columns.numel()
    if not (is_table and unit_columns.min() >= 0 and unit_columns.max() < width):
        expected = f"columns of every unit [unit, feature], as int64 below {width}"
        raise invalid("unit_columns", unit_columns, expected)


@safe_contextmanager
def full_precision() -> Iterator[None]:
    """Compute float32 products without CUDA's TF32, which keeps ten bits of each factor."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
