"""Compensation of dropped layers: one linear map, folded into the FFN before them (ReplaceMe)."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator

import torch
from torch import nn
from transformers import PreTrainedModel

from ..calibration import run_decoder, sum_dtype, watch
from ..checks import Batches, Flag, Instance, InvalidArgument, Model, Number, checked
from ..domains import read_windows
from ..models import Anatomy, PruningPlan, inference, masked, weight_axis
from .projection import require_plain_sums


@checked(
    model=Model(), plan=Instance(PruningPlan), batches=Batches(), damping=Number(0), progress=Flag()
)
@torch.inference_mode(False)  # weights made under it could not be trained or hashed later
@torch.no_grad()
def linear_compensated(
    model: PreTrainedModel,
    plan: PruningPlan,
    batches: Iterable[dict[str, torch.Tensor]],
    *,
    damping: float = 0.01,
    progress: bool = True,
) -> PreTrainedModel:
    """Copy a model with a linear map ahead of dropped layers (ReplaceMe, arXiv 2505.02819).

    For layers i+1 … i+n that a plan drops whole, let *M* be what the FFN of layer *i* adds to the
    residual stream, *X* the stream after the dropped layers of the pruned model, and *Y* that of
    the dense model (tokens as rows). The map ``M T`` in place of *M* is to make up for the layers::

        T = argmin ‖X - M + M T - Y‖² + a ‖T - I‖² = I + (Mᵀ M + a I)⁻¹ Mᵀ (Y - X)

    It goes into the last projection of that FFN: ``W ← Tᵀ W``, ``b ← Tᵀ b``. So the model gets no
    new parameters. If the projection has a bias, M and Y - X are taken less their means, for which
    the bias makes up.

    The paper's penalty is ``a ‖T‖²``; towards the identity, more damping ends at plain dropping.
    Its *X* and *M* are of the dense model, the same up to the first dropped layer; here they are of
    the model as the plan leaves it, after the maps of earlier layers.

    The dropped layers are still there: apply the plan to the copy, by ``masked(copy, plan)`` or
    ``shrink(copy, plan)``.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Left as it is.
    plan : PruningPlan
        Whole layers to drop, as `plan_dropping` finds them, and whatever else.
    batches : iterable of dict
        Calibration tokens; padding is left out.
    damping : float
        Share of the mean of MᵀM's diagonal that is *a*.
    progress : bool
        Show progress bars.

    Raises
    ------
    ValueError
        If the plan does not fit the model or drops no whole layer, there is no FFN before a dropped
        layer, norms stand between the FFN and the residual stream (Gemma 2 and 3, OPT-350m), or a
        hidden state is not finite.
    """
    anatomy = plan.require(model)
    require_plain_sums(
        anatomy, "drop the layers without a map (plan_dropping), and fine-tune with lab.recover"
    )
    runs = list(_dropped_runs(anatomy, plan))
    updated = copy.deepcopy(model)
    for first, last in runs:
        module = Anatomy(updated).module(first - 1, anatomy.family.consumes["ffn"])
        # 1. Sums over tokens of M and Y - X, and of their products.
        with masked(updated, plan):
            sums = _sums(model, updated, module, last, batches, progress)
        # 2. D = T - I and the offset of the bias.
        D, offset = _solution(sums, damping, module.bias is not None)
        D, offset = (each.to(sums[0].device, sums[0].dtype) for each in (D, offset))
        if not torch.isfinite(D).all():
            raise ValueError(f"layer {first - 1} or {last} puts out NaN or infinite values")
        # 3. W ← Tᵀ W, b ← Tᵀ b + offset.
        W = module.weight.movedim(weight_axis(module, "output"), 0)  # [out, in], a view
        W += (D.mT @ W.to(D)).to(W)
        if module.bias is not None:
            module.bias += (D.mT @ module.bias.to(D) + offset).to(module.bias)
    return updated


def _sums(
    model: PreTrainedModel,
    pruned: PreTrainedModel,
    module: nn.Module,
    last: int,
    batches: Iterable[dict[str, torch.Tensor]],
    progress: bool,
) -> list[torch.Tensor]:
    """Means over tokens of ``M, R, MᵀM, MᵀR``, with R = Y - X after layer `last`."""
    found: dict[str, torch.Tensor] = {}

    def note(name: str, _input: torch.Tensor, output: torch.Tensor) -> None:
        found[name] = output.detach().flatten(0, -2).float()  # [token, feature]

    dense = {"Y": Anatomy(model).layers[last]}
    own = {"M": module, "X": Anatomy(pruned).layers[last]}
    sums, n_tokens = [0.0] * 4, 0
    with inference(model), inference(pruned), watch({**dense, **own}, after=note):
        for ids in read_windows(batches, "dropped layers", progress):
            run_decoder(model, ids)
            run_decoder(pruned, ids)
            M, R = found["M"], found["Y"] - found["X"]
            terms = (M.sum(0), R.sum(0), M.mT @ M, M.mT @ R)
            dtype = sum_dtype(M.device)
            sums = [total + term.to(dtype) for total, term in zip(sums, terms, strict=True)]
            n_tokens += len(M)
    return [total / n_tokens for total in sums]


def _solution(
    sums: list[torch.Tensor], damping: float, centred: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """``D = (Mᵀ M + a I)⁻¹ Mᵀ R`` and the offset ``E[R] - Dᵀ E[M]``, 0 if not `centred`."""
    mean_M, mean_R, MM, MR = (each.cpu().double() for each in sums)
    if centred:
        MM, MR = MM - mean_M.outer(mean_M), MR - mean_M.outer(mean_R)
    a = damping * MM.diagonal().mean()
    D = torch.linalg.lstsq(MM + a * torch.eye(len(MM), dtype=MM.dtype), MR).solution
    return D, mean_R - D.mT @ mean_M if centred else torch.zeros_like(mean_R)


def _dropped_runs(anatomy: Anatomy, plan: PruningPlan) -> Iterator[tuple[int, int]]:
    """First and last layer of every row of layers without attention and FFN, by the plan.

    Raises
    ------
    InvalidArgument
        If there are none, or one has no FFN before it.
    """
    kept = {site: [*map(len, layers)] for site, layers in plan.keep.items()}
    widths = anatomy.layer_widths() | kept
    attention = [*map(min, widths["attention"], widths["balanced_heads"])]
    layers = range(len(anatomy.layers))
    whole = [layer for layer in layers if not (attention[layer] or widths["ffn"][layer])]
    if not whole:
        raise InvalidArgument(
            "the plan drops no whole layer; expected one whose attention and FFN are both dropped: "
            "lab.plan_dropping(model, lab.block_influence(model, batches), count=1)"
        )
    for _, group in itertools.groupby(whole, lambda layer: layer - whole.index(layer)):
        first, *_ = run = [*group]
        if first == 0 or not widths["ffn"][first - 1]:
            raise InvalidArgument(
                f"the plan drops layer {first} with no FFN before it that could take up the map; "
                f"keep layer {max(first - 1, 0)}'s FFN, or drop it without a map"
            )
        yield first, run[-1]
