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

from ..calibration import DAMPING_MODES, Indefinite, damped_inverse, refit
from ..checks import Flag, Instance, Integer, Number, OneOf, checked, invalid, safe_contextmanager


def exact_saliency(W: torch.Tensor, H_inv: torch.Tensor, units: torch.Tensor) -> torch.Tensor:
    """``tr(W_g ([H⁻¹]_gg)⁻¹ W_gᵀ)``: loss of removing unit *g* once the other weights are updated.

    Parameters
    ----------
    W : torch.Tensor
        Weight ``[out, in]``.
    H_inv : torch.Tensor
        H⁻¹ ``[in, in]``.
    units : torch.Tensor
        Columns of every unit ``[unit, feature]``.

    Returns
    -------
    torch.Tensor
        Saliency of every unit ``[unit]``.
    """
    W_g, H_inv_gg = _unit_columns(W, units), _unit_blocks(H_inv, units)
    # With [H⁻¹]_gg = L Lᵀ the trace is ‖L⁻¹ W_gᵀ‖².
    L = torch.linalg.cholesky(H_inv_gg)  # [unit, feature, feature]
    return torch.linalg.solve_triangular(L, W_g.mT, upper=False).square().sum((1, 2))


def slimgpt_saliency(W: torch.Tensor, H_inv: torch.Tensor, units: torch.Tensor) -> torch.Tensor:
    """``Σ_ij W_ij² / U_jj²`` with ``[H⁻¹]_gg = Uᵀ U``: SlimGPT's grouped Cholesky (algorithm 1).

    Weights are not updated inside a unit while it is scored, so this is the exact loss only for
    units of one column. Arguments and result as of `exact_saliency`.
    """
    W_g, H_inv_gg = _unit_columns(W, units), _unit_blocks(H_inv, units)
    # torch gives L = Uᵀ, with the same diagonal.
    U_jj = torch.linalg.cholesky(H_inv_gg).diagonal(dim1=1, dim2=2)  # [unit, feature]
    return (W_g.square().sum(1) / U_jj.square()).sum(1)  # [unit]


def diagonal_saliency(W: torch.Tensor, H_inv: torch.Tensor, units: torch.Tensor) -> torch.Tensor:
    """``Σ_ij W_ij² / [H⁻¹]_jj``: SlimGPT's ablation without the grouped Cholesky.

    Arguments and result as of `exact_saliency`.
    """
    by_column = W.square().sum(0) / H_inv.diagonal()  # [in]
    return by_column[units].sum(1)  # [unit]


def _unit_columns(W: torch.Tensor, units: torch.Tensor) -> torch.Tensor:
    """``W_g`` of every unit: its columns of the weight."""
    return W[:, units].movedim(1, 0)  # [unit, out, feature]


def _unit_blocks(H_inv: torch.Tensor, units: torch.Tensor) -> torch.Tensor:
    """``[H⁻¹]_gg`` of every unit: its block on the diagonal of the inverse."""
    return H_inv[units[:, :, None], units[:, None, :]]  # [unit, feature, feature]


#: Estimates of the loss of removing one unit. For units of one column they agree.
SALIENCIES = {"exact": exact_saliency, "slimgpt": slimgpt_saliency, "diag": diagonal_saliency}


#: Check of `block_size`.
BLOCK_SIZE = Integer(1) | OneOf(["dynamic"])


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
    size = min(max(remaining // 2, 8), 1024) if block_size == "dynamic" else block_size
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
    units=Instance(torch.Tensor),
    count=Integer(0),
    saliency=OneOf(SALIENCIES),
    block_size=BLOCK_SIZE,
    damping=Number(0),
    damping_mode=OneOf(DAMPING_MODES),
    compensate=Flag(),
)
def eliminate(
    W: torch.Tensor,
    H: torch.Tensor,
    units: torch.Tensor,
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
    units : torch.Tensor
        Columns of every unit ``[unit, feature]``.
    count : int
        Units to remove; less than all.
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
    _require_shapes(W, H, units)
    options = (saliency, block_size, damping, damping_mode, compensate)
    return eliminate_levels(W, H, units, [count], *options)[0]


def eliminate_levels(
    W: torch.Tensor,
    H: torch.Tensor,
    units: torch.Tensor,
    counts: Sequence[int],
    saliency: str = "exact",
    block_size: str | int = "dynamic",
    damping: float = 0.3,
    damping_mode: str = "feature",
    compensate: bool = True,
) -> list[Elimination]:
    """`eliminate` for several ascending counts in one run.

    Units that are removed for one count are also removed for the next. Block sizes start anew at
    each count.
    """
    for count in counts:
        if count >= len(units):
            raise ValueError(
                f"count is {count}; expected fewer than the {len(units)} units: one must be kept"
            )
    if not counts or list(counts) != sorted(set(counts)):
        raise ValueError(f"counts are {[*counts]}; expected at least one, ascending")
    scale = quadratic_form(W, H)

    # 1. Remove dead units, whose inputs are always zero, and go on with the live units' columns.
    dead = torch.nonzero((H.diagonal() == 0)[units].all(1)).ravel()[: counts[-1]].tolist()
    order = list(dead)
    live = torch.tensor(_kept_units(dead, len(units)), device=units.device)  # [unit]
    columns = units[live].ravel()  # [unit · feature]

    # 2. Damp and invert H once.
    H_damped, H_inv = damped_inverse(H[columns][:, columns], damping, damping_mode)

    # 3. Remove block after block. W_t and H_inv shrink: they hold the columns of the live units
    #    that remain (indices into `live`), side by side.
    W_t = W[:, columns]
    remaining = torch.arange(len(live), device=units.device)
    results = []
    for count in counts:
        start = len(order)
        while len(order) < count:
            columns_t = unit_columns(len(remaining), units.shape[1], units.device)
            saliencies = SALIENCIES[saliency](W_t, H_inv, columns_t)  # [unit]
            size = next_block(block_size, len(order) - start, count - start)
            lowest = saliencies.argsort(stable=True)[:size]
            order += live[remaining[lowest]].tolist()
            W_t, H_inv = remove_columns(W_t, H_inv, columns_t[lowest].ravel())
            remaining = remaining[_complement(lowest, len(remaining))]

        # 4. Refit from the original weights, so that rounding errors do not add up.
        kept = _kept_units(order[:count], len(units))
        W_kept = W[:, units[kept].ravel()]
        if compensate and count > len(dead):
            live_columns = unit_columns(len(live), units.shape[1], units.device)
            kept_columns = live_columns[remaining].ravel()
            W_kept = refit(W[:, columns], H_damped, kept_columns)  # [out, unit · feature]
        if not torch.isfinite(W_kept).all():
            raise Indefinite("the updated weights are not finite")
        loss = reconstruction_loss(W, H, W_kept, units[kept].ravel())
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


def unit_columns(n_units: int, n_features: int, device: torch.device) -> torch.Tensor:
    """Columns of units that lie side by side: 0, 1, 2, … as ``[unit, feature]``."""
    return torch.arange(n_units * n_features, device=device).reshape(n_units, n_features)


def _complement(indices: torch.Tensor, total: int) -> torch.Tensor:
    """Indices from 0 to `total` - 1 that are not in `indices`, ascending."""
    mask = torch.ones(total, dtype=torch.bool, device=indices.device)
    mask[indices] = False
    return mask.nonzero().ravel()


def _kept_units(removed: Sequence[int], total: int) -> list[int]:
    """Units from 0 to `total` - 1 that were not removed, ascending."""
    return sorted(set(range(total)) - set(removed))


def _require_shapes(W: torch.Tensor, H: torch.Tensor, units: torch.Tensor) -> None:
    """Refuse arguments of `eliminate` whose shapes or dtypes do not fit together."""
    if W.ndim != 2 or not W.is_floating_point():
        raise invalid("W", W, "a matrix of floating-point numbers [out, in]")
    if H.shape != (W.shape[1],) * 2 or H.dtype != W.dtype:
        raise invalid("H", H, f"a matrix [{W.shape[1]}, {W.shape[1]}] of W's type {W.dtype}")
    if units.ndim != 2 or units.dtype != torch.int64 or not units.numel():
        raise invalid("units", units, "columns of every unit [unit, feature], as int64")
    if not (units.min() >= 0 and units.max() < W.shape[1]):
        raise invalid("units", units, f"columns of W, which has {W.shape[1]}")


@safe_contextmanager
def full_precision() -> Iterator[None]:
    """Compute float32 products without CUDA's TF32, which keeps ten bits of each factor."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
