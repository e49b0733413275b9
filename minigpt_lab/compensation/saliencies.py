"""Estimates of the loss of removing one unit of a linear layer's input.

`W` is the weight ``[out, in]``, `H_inv` is H⁻¹ ``[in, in]``, `columns` are those of every unit *g*
``[unit, feature]``. Each function returns the saliency of every unit ``[unit]``; for units of one
column all agree.
"""

from __future__ import annotations

import torch


def exact_saliency(W: torch.Tensor, H_inv: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """``tr(W_g ([H⁻¹]_gg)⁻¹ W_gᵀ)``: the loss once the other weights are updated."""
    W_g, H_inv_gg = _blocks(W, H_inv, columns)
    # With [H⁻¹]_gg = L Lᵀ the trace is ‖L⁻¹ W_gᵀ‖².
    L = torch.linalg.cholesky(H_inv_gg)  # [unit, feature, feature]
    return torch.linalg.solve_triangular(L, W_g.mT, upper=False).square().sum((1, 2))


def slimgpt_saliency(W: torch.Tensor, H_inv: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """``Σ_ij W_ij² / U_jj²`` with ``[H⁻¹]_gg = Uᵀ U``: SlimGPT's grouped Cholesky (algorithm 1).

    Weights are not updated inside a unit while it is scored, so this is the exact loss only for
    units of one column.
    """
    W_g, H_inv_gg = _blocks(W, H_inv, columns)
    # torch gives L = Uᵀ, with the same diagonal.
    U_jj = torch.linalg.cholesky(H_inv_gg).diagonal(dim1=1, dim2=2)  # [unit, feature]
    return (W_g.square().sum(1) / U_jj.square()).sum(1)


def diagonal_saliency(W: torch.Tensor, H_inv: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """``Σ_ij W_ij² / [H⁻¹]_jj``: SlimGPT's ablation without the grouped Cholesky."""
    by_column = W.square().sum(0) / H_inv.diagonal()  # [in]
    return by_column[columns].sum(1)


def _blocks(
    W: torch.Tensor, H_inv: torch.Tensor, columns: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """``W_g [unit, out, feature]`` and ``[H⁻¹]_gg [unit, feature, feature]`` of every unit."""
    W_g = W[:, columns].movedim(1, 0)
    return W_g, H_inv[columns[:, :, None], columns[:, None, :]]


#: The estimates by name.
SALIENCIES = {"exact": exact_saliency, "slimgpt": slimgpt_saliency, "diag": diagonal_saliency}
