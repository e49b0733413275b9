"""Second moments of linear layers' inputs: the Hessian of the squared error of their outputs.

For ``min ‖W X - W' X‖²`` all rows of *W* share ``H = X Xᵀ`` (up to a factor; Optimal Brain Surgeon,
SparseGPT, arXiv 2301.00774). Here it is the mean over tokens, without the factor 2.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass

import pandas as pd
import torch
from transformers import PreTrainedModel

from ..checks import Batches, Flag, Instance, Model, Number, OneOf, checked, invalid
from ..domains import read_windows
from ..models import fingerprint, inference, require_weights
from .forward import run_decoder
from .gradients import NAMES, linear_modules
from .moments import second_moments

#: What a share of damping is a share of.
DAMPING_MODES = ("mean", "feature")


@dataclass(frozen=True, repr=False)
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

    def __repr__(self) -> str:
        return f"Hessians of {len(self.matrices)} linear layers' inputs, {self.n_tokens:,} tokens"

    def _repr_html_(self) -> str:
        return self.to_frame().to_html(index=False)

    def to_frame(self) -> pd.DataFrame:
        """Tidy table with columns ``module, features, mean_square`` (of all features)."""
        rows = [[name, len(H), float(H.diagonal().mean())] for name, H in self.matrices.items()]
        return pd.DataFrame(rows, columns=["module", "features", "mean_square"])

    def require(self, model: PreTrainedModel) -> None:
        """Refuse another model than the one measured.

        Raises
        ------
        ValueError
            If the model's weights are not those that read the tokens.
        """
        require_weights(model, self.model_hash, "these Hessians")


@checked(model=Model(), batches=Batches(), names=NAMES, progress=Flag())
def collect_hessians(
    model: PreTrainedModel,
    batches: Iterable[dict[str, torch.Tensor]],
    names: Iterable[str],
    *,
    progress: bool = True,
) -> Hessians:
    """Second moments of the inputs of linear layers, in one pass over the dense model.

    A matrix has as many entries as features squared: for a large model take a few layers at a time.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A supported causal language model; unchanged afterwards.
    batches : iterable of dict
        Calibration tokens; padding is left out.
    names : iterable of str
        Full names of the linear layers.
    progress : bool
        Show a progress bar.

    Raises
    ------
    ValueError
        If there are no tokens, a name is none of a linear layer, or what it reads is not finite.
    """
    modules = linear_modules(model, names)
    n_tokens = 0
    with inference(model), second_moments(modules) as moments:
        for ids in read_windows(batches, "Hessians", progress):
            run_decoder(model, ids)
            n_tokens += ids.numel()
    matrices = {name: moments[name].second() for name in modules}
    for name, H in matrices.items():
        if not torch.isfinite(H).all():
            raise ValueError(f"{name} has NaN or infinite values at its input: check the weights")
    return Hessians(matrices, fingerprint(model), n_tokens)


class Indefinite(ValueError):
    """A matrix that cannot be inverted in the precision at hand."""


@checked(H=Instance(torch.Tensor), damping=Number(0), damping_mode=OneOf(DAMPING_MODES))
def damped_inverse(
    H: torch.Tensor, damping: float, damping_mode: str = "mean"
) -> tuple[torch.Tensor, torch.Tensor]:
    """H with a share of its diagonal added to it, and the inverse of that.

    Features that are always zero get 1 on the diagonal. If H is not definite the share grows
    tenfold at a time, with a warning.

    Parameters
    ----------
    H : torch.Tensor
        ``[feature, feature]``.
    damping : float
        The share.
    damping_mode : {"mean", "feature"}
        Of the mean of the diagonal, for every feature the same (SparseGPT, SlimGPT); or of each
        feature's own second moment, which shrinks all correlations alike and so does not depend on
        how features are scaled.

    Returns
    -------
    torch.Tensor, torch.Tensor
        The damped matrix and its inverse.

    Raises
    ------
    ValueError
        If H is not finite, an option is out of range, or no damping up to the whole diagonal is
        enough.
    """
    if H.ndim != 2 or H.shape[0] != H.shape[1] or not H.is_floating_point():
        raise invalid("H", H, "a square matrix of floating-point numbers")
    if not torch.isfinite(H).all():
        raise ValueError("the second moment has NaN or infinite values")
    damped = (H + H.mT).div_(2)
    diagonal = damped.diagonal().clone()
    unit = diagonal.mean() if damping_mode == "mean" else diagonal
    for share in (damping, *(10.0**power for power in range(-6, 1) if 10.0**power > damping)):
        damped.diagonal().copy_(torch.where(diagonal == 0, 1, diagonal + share * unit))
        L, failed = torch.linalg.cholesky_ex(damped)
        # a pivot is what a feature varies beside those before it: below rounding it is none
        pivots, noise = L.diagonal().square(), torch.finfo(damped.dtype).eps
        if not failed and (pivots > noise * damped.diagonal()).all():
            if share != damping:
                warnings.warn(
                    f"a second moment of {len(H)} features is singular at damping={damping}: "
                    f"damped by {share:g} of its diagonal; more calibration tokens help",
                    stacklevel=2,
                )
            return damped, torch.cholesky_inverse(L)
    raise Indefinite("the second moment is not positive definite, however much it is damped")


def refit(W: torch.Tensor, H: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Least-squares weights of the kept columns: ``argmin_W' ‖W X - W' X_kept‖²``.

    Normal equations: ``W' = W H[:, kept] (H[kept, kept])⁻¹``.

    Parameters
    ----------
    W, H : torch.Tensor
        ``[output, input]``, and ``[input, input]``, positive definite.
    kept : torch.Tensor
        Indices of the kept columns.
    """
    L = torch.linalg.cholesky(H[kept][:, kept])  # [kept, kept]
    return torch.cholesky_solve((W @ H[:, kept]).mT, L).mT  # [output, kept]
