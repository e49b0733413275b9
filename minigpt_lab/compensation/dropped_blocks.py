"""Compensation of dropped blocks: a linear map, folded into the projection before (ReplaceMe)."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from ..calibration import run_decoder, sum_dtype, watch
from ..checks import Batches, Flag, Instance, InvalidArgument, Model, Number, checked
from ..domains import read_windows
from ..models import Anatomy, PruningPlan, inference, masked, weight_axis
from .projection import require_plain_sums


class Block(NamedTuple):
    """A layer's attention or FFN."""

    layer: int
    site: str


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
    """Copy a model with a linear map ahead of dropped blocks (ReplaceMe, arXiv 2505.02819).

    A row of blocks, attention or FFN, that a plan drops one after the other begins behind a block
    that stays. Let *M* be what that one adds to the residual stream, *X* the stream behind the row
    in the pruned model, and *Y* that of the dense model (tokens as rows). The map ``M T`` in place
    of *M* is to make up for the row::

        T = argmin ‖X - M + M T - Y‖² + a ‖T - I‖² = I + (Mᵀ M + a I)⁻¹ Mᵀ (Y - X)

    It goes into the last projection of the block that stays: ``W ← Tᵀ W``, ``b ← Tᵀ b``. So the
    model gets no new parameters. If the projection has a bias, M and Y - X are taken less their
    means, for which the bias makes up.

    The paper drops whole layers, so that *M* is the output of an FFN; here it is that of an
    attention where an FFN alone is dropped. Where attention and FFN are parallel and the attention
    alone is dropped, *Y* and *X* are the layer's outputs less its FFN's.

    The paper's penalty is ``a ‖T‖²``; towards the identity, more damping ends at plain dropping.
    Its *X* and *M* are of the dense model, the same up to the first dropped layer; here they are of
    the model as the plan leaves it, after the maps of earlier layers.

    The dropped blocks are still there: apply the plan to the copy, by ``masked(copy, plan)`` or
    ``shrink(copy, plan)``.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Left as it is.
    plan : PruningPlan
        Blocks to drop, as `plan_dropping` finds them, and whatever else.
    batches : iterable of dict
        Calibration tokens; padding is left out.
    damping : float
        Share of the mean of MᵀM's diagonal that is *a*.
    progress : bool
        Show progress bars.

    Raises
    ------
    ValueError
        If the plan does not fit the model or drops no block, the first attention is dropped, norms
        stand between a block and the residual stream (Gemma 2 and 3, OPT-350m), or a hidden state
        is not finite.
    """
    anatomy = plan.require(model)
    require_plain_sums(
        anatomy, "drop the blocks without a map (plan_dropping), and fine-tune with lab.recover"
    )
    runs = list(_dropped_runs(anatomy, plan))
    updated = copy.deepcopy(model)
    for before, last in runs:
        # 1. Sums over tokens of M and Y - X, and of their products.
        with masked(updated, plan):
            sums = _sums(anatomy, Anatomy(updated), plan, before, last, batches, progress)
        # 2. D = T - I and the offset of the bias.
        module = _projection(Anatomy(updated), before)
        if not all(torch.isfinite(each).all() for each in sums):
            raise ValueError(
                f"layer {before.layer} or {last.layer} puts out NaN or infinite values: check its "
                "weights"
            )
        D, offset = _solution(sums, damping, module.bias is not None)
        D, offset = (each.to(sums[0].device, sums[0].dtype) for each in (D, offset))
        # 3. W ← Tᵀ W, b ← Tᵀ b + offset.
        W = module.weight.movedim(weight_axis(module, "output"), 0)  # [out, in], a view
        W += (D.mT @ W.to(D)).to(W)
        if module.bias is not None:
            module.bias += (D.mT @ module.bias.to(D) + offset).to(module.bias)
    return updated


def _projection(anatomy: Anatomy, block: Block) -> nn.Module:
    """The last projection of a block, which adds to the residual stream."""
    return anatomy.module(block.layer, anatomy.family.consumes[block.site])


def _sums(
    dense: Anatomy,
    pruned: Anatomy,
    plan: PruningPlan,
    before: Block,
    last: Block,
    batches: Iterable[dict[str, torch.Tensor]],
    progress: bool,
) -> list[torch.Tensor]:
    """Means over tokens of ``M, R, MᵀM, MᵀR``, with R = Y - X behind block `last`."""
    found: dict[str, torch.Tensor] = {}

    def note(name: str, _input: torch.Tensor, output: torch.Tensor) -> None:
        found[name] = output.detach().flatten(0, -2).float()  # [token, feature]

    # Behind attention the stream is the layer's output less what its FFN has added.
    behind = {"Y": dense, "X": pruned}
    modules = {name: each.layers[last.layer] for name, each in behind.items()}
    if last.site == "attention":
        ffn = Block(last.layer, "ffn")
        modules |= {f"{name} FFN": _projection(each, ffn) for name, each in behind.items()}
    modules["M"] = _projection(pruned, before)
    name = pruned.name(before.layer, pruned.family.consumes[before.site])
    shift = plan.shift.get(name)  # added behind the map, as it is
    sums, n_tokens = [0.0] * 4, 0
    models = [each.model for each in behind.values()]
    with inference(models[0]), inference(models[1]), watch(modules, after=note):
        for ids in read_windows(batches, "dropped blocks", progress):
            for model in models:
                run_decoder(model, ids)
            Y, X = (found[name] - found.get(f"{name} FFN", 0) for name in behind)
            M, R = found["M"], Y - X
            M = M if shift is None else M - torch.as_tensor(shift).to(M)
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


def _dropped_runs(anatomy: Anatomy, plan: PruningPlan) -> Iterator[tuple[Block, Block]]:
    """Of every row of dropped blocks, the block before it and its last, by the plan.

    Raises
    ------
    InvalidArgument
        If there are none, or the first attention is dropped.
    """
    there = anatomy.layer_widths()
    left = there | {site: [*map(len, layers)] for site, layers in plan.keep.items()}
    for widths in (there, left):
        widths["attention"] = [*map(min, widths["attention"], widths["balanced_heads"])]
    layers = range(len(anatomy.layers))
    every = [Block(layer, site) for layer in layers for site in ("attention", "ffn")]
    blocks = [block for block in every if there[block.site][block.layer]]  # of this model
    if all(left[block.site][block.layer] for block in blocks):
        raise InvalidArgument(
            "the plan drops no block; expected an attention or FFN, or both of a layer: "
            "lab.plan_dropping(model, lab.block_influence(model, batches), count=1)"
        )
    before = None
    for stays, group in itertools.groupby(blocks, lambda each: left[each.site][each.layer] > 0):
        row = [*group]
        if not stays and before is None:
            raise InvalidArgument(
                f"the plan drops layer {row[0].layer}'s {row[0].site}, with no block before it "
                "that could take up the map; keep it, or drop it without a map"
            )
        if not stays:
            yield before, row[-1]
        before = row[-1]
