"""Second moments of what linear layers read: the Hessian of the error of their outputs.

For ``min ‖WX - W'X‖²`` all rows of *W* share ``H = X Xᵀ`` (up to a factor; Optimal Brain Surgeon,
SparseGPT, arXiv 2301.00774). Here it is the mean over tokens, without the factor 2.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..checks import (
    Batches,
    Flag,
    InvalidArgument,
    ListOf,
    Model,
    Number,
    OneOf,
    Text,
    checked,
    hooked,
    safe_contextmanager,
    suggest,
)
from ..domains import unpadded
from ..models import (
    Anatomy,
    check_token_ids,
    fingerprint,
    inference,
    require_weights,
)


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


class Moments:
    """First and second moments of what a linear layer reads, over tokens.

    Sums are of ``x - c``, with *c* the mean of the first tokens: around the mean of large and
    nearly constant features nothing is then lost to rounding.

    Parameters
    ----------
    dtype, sums : torch.dtype
        Of the products, and of their sums.
    """

    def __init__(self, dtype: torch.dtype = torch.float32, sums: torch.dtype | None = None):
        self.dtype, self.sums = dtype, sums or dtype
        self.count = 0

    def add(self, states: torch.Tensor) -> None:
        """Count in ``[…, feature]``."""
        x = states.detach().flatten(0, -2).to(self.dtype)  # [token, feature]
        if not self.count:
            self.shift = x.mean(0)
            self.square = x.new_zeros(x.shape[1], x.shape[1], dtype=self.sums)
            self.sum = x.new_zeros(x.shape[1], dtype=self.sums)
        x = x - self.shift
        if self.sums == self.dtype:
            self.square.addmm_(x.T, x)
        else:
            self.square += x.T @ x
        self.sum += x.sum(0)
        self.count += len(x)

    @property
    def mean(self) -> torch.Tensor:
        """``E[x]``."""
        return self.shift + self.sum / self.count

    def covariance(self) -> torch.Tensor:
        """``E[(x - E[x]) (x - E[x])ᵀ]``; exactly 0 for features that only rounding moves."""
        offset = self.sum / self.count
        found = (self.square / self.count).addr_(offset, offset, alpha=-1)
        still = found.diagonal() <= (2 * torch.finfo(torch.float32).eps * self.mean).square()
        return found.masked_fill_(still | still[:, None], 0)

    def second(self) -> torch.Tensor:
        """``E[x xᵀ] = E[(x - c) (x - c)ᵀ] + c E[x - c]ᵀ + E[x] cᵀ``."""
        shift = self.shift.to(self.sums)
        found = (self.square / self.count).addr_(shift, self.sum / self.count)
        return found.addr_(self.mean.to(self.sums), shift)


@safe_contextmanager
def second_moments(modules: dict[str, nn.Module]) -> Iterator[dict[str, Moments]]:
    """Moments of every token that enters linear layers while inside, by their names.

    Layers that read one tensor (q, k and v) share them.
    """
    found: dict[str, Moments] = {}
    last: tuple[torch.Tensor, Moments] | None = None

    def hook(name: str):
        def add(_module: nn.Module, args: tuple) -> None:
            nonlocal last
            if last is not None and args[0] is last[0]:
                found[name] = last[1]
                return
            # float64 sums where there is float64
            sums = torch.float32 if args[0].device.type == "mps" else torch.float64
            moments = found.setdefault(name, Moments(sums=sums))
            moments.add(args[0])
            last = args[0], moments

        return add

    hooks = [partial(each.register_forward_pre_hook, hook(name)) for name, each in modules.items()]
    with hooked(*hooks):
        yield found


@checked(model=Model(), batches=Batches(), names=ListOf(Text(), 1), progress=Flag())
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
        If there are no tokens, a name is none of a linear layer, or what it reads is not finite.
    """
    linears = {name: module for _, name, module in Anatomy(model).linears()}
    for name in names:
        if name not in linears:
            hint = suggest(name, [*linears])
            raise InvalidArgument(f"names has {name!r}, no linear layer of the decoder; {hint}")
    modules = {name: linears[name] for name in names}
    n_tokens = 0
    with inference(model), second_moments(modules) as moments:
        for ids in tqdm(unpadded(batches), desc="Hessians", unit="batch", disable=not progress):
            check_token_ids(model, ids)
            n_tokens += ids.numel()
            model.base_model(input_ids=ids.to(model.device), use_cache=False)
    matrices = {name: moments[name].second() for name in modules}
    for name, matrix in matrices.items():
        if not torch.isfinite(matrix).all():
            raise ValueError(f"{name} has NaN or infinite values at its input: check the weights")
    return Hessians(matrices, fingerprint(model), n_tokens)


class Indefinite(ValueError):
    """A matrix that cannot be inverted in the precision at hand."""


#: What a share of damping is a share of.
DAMPING_MODES = ("mean", "feature")


def damped_inverse(
    hessian: torch.Tensor, damping: float, damping_mode: str = "mean"
) -> tuple[torch.Tensor, torch.Tensor]:
    """H with a share of its diagonal added to it, and the inverse of that.

    Features that are always zero get 1 on the diagonal. If H is not definite the share grows
    tenfold at a time, with a warning.

    Parameters
    ----------
    hessian : torch.Tensor
        ``[feature, feature]``.
    damping : float
        The share.
    damping_mode : {"mean", "feature"}
        Of the mean of the diagonal, for every feature the same (SparseGPT, SlimGPT); or of each
        feature's own second moment, which shrinks all correlations alike and so does not depend on
        how features are scaled.

    Raises
    ------
    ValueError
        If H is not finite, an option is out of range, or no damping up to the whole diagonal is
        enough.
    """
    damping = Number(0)("damping", damping)
    damping_mode = OneOf(DAMPING_MODES)("damping_mode", damping_mode)
    if not torch.isfinite(hessian).all():
        raise ValueError("the second moment has NaN or infinite values")
    damped = (hessian + hessian.mT).div_(2)
    diagonal = damped.diagonal().clone()
    unit = diagonal.mean() if damping_mode == "mean" else diagonal
    for share in (damping, *(10.0**power for power in range(-6, 1) if 10.0**power > damping)):
        damped.diagonal().copy_(torch.where(diagonal == 0, 1, diagonal + share * unit))
        factor, failed = torch.linalg.cholesky_ex(damped)
        # a pivot is what a feature varies beside those before it: below rounding it is none
        pivots, noise = factor.diagonal().square(), torch.finfo(damped.dtype).eps
        if not failed and (pivots > noise * damped.diagonal()).all():
            if share != damping:
                warnings.warn(
                    f"a second moment of {len(hessian)} features is singular at damping={damping}: "
                    f"damped by {share:g} of its diagonal; more calibration tokens help",
                    stacklevel=2,
                )
            return damped, torch.cholesky_inverse(factor)
    raise Indefinite("the second moment is not positive definite, however much it is damped")


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
