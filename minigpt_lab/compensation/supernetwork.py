"""Supernet: a model in which every layer can be set to one of several pruned widths, in place.

The supernet of Týr-the-Pruner (arXiv 2503.09657): one pass over the calibration tokens gives every
layer's heads and channels updated weights at each of several levels. Removed units are zero columns
of the projection that reads them. So no shape changes, and to set a budget takes a few copies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..calibration import LayerRunner, catch_inputs
from ..checks import restore_on_exit, safe_contextmanager
from ..models import Anatomy, add_bias, inference, weight_axis
from ..planning import LayerSite
from ..store import Shards
from .budgets import Budget
from .calibration_windows import CalibrationWindows
from .obs import full_precision
from .projection import Problem, bias_update, read_problem, solve_levels
from .solver import Solver


class PrunableProjection:
    """The projection that reads one layer site's units, with its parameters at every level.

    A level is a number of removed units; 0, the dense projection, is there from the start.

    Parameters
    ----------
    module : torch.nn.Module
        The projection (o or down).
    offload : {"device", "cpu", "disk"}
        Place of the levels' weights; see `Shards`.
    """

    def __init__(self, module: nn.Module, offload: str):
        self.module, self.axis = module, weight_axis(module, "input")
        # the model's own parameters: `set` puts others in their place
        self.W, self.bias = module.weight, module.bias
        self.W_kept = Shards(offload)  # by level [out, kept]
        self.columns: dict[int, torch.Tensor] = {}  # by level [kept]
        self.bias_update: dict[int, torch.Tensor | float] = {}  # by level [out]
        W = self.W.detach().movedim(self.axis, 1)  # [out, in]
        self.add(0, torch.arange(W.shape[1], device=W.device), W, 0.0)
        self.set(0)

    def add(
        self, level: int, columns: torch.Tensor, W_kept: torch.Tensor, update: torch.Tensor | float
    ) -> None:
        """Add a level: its kept columns, their weight, and what is added to the bias."""
        self.columns[level], self.bias_update[level] = columns, update
        self.W_kept[level] = W_kept.to(self.W.dtype)

    @torch.no_grad()
    def at(self, level: int) -> list[torch.Tensor]:
        """Weight at a level, zero in the removed columns, and bias if there is one."""
        W_kept = self.W_kept[level].movedim(1, self.axis)
        W = torch.zeros_like(self.W).index_copy_(self.axis, self.columns[level], W_kept)
        if self.bias is None:
            return [W]
        return [W, (self.bias + self.bias_update[level]).to(self.bias.dtype)]

    def set(self, level: int) -> None:
        """Set the model's projection to a level."""
        # new Parameters instead of new values, so that the model's own are untouched
        for name, value in zip(("weight", "bias"), self.at(level), strict=False):
            setattr(self.module, name, nn.Parameter(value))
        self.current = level

    def parameters(self) -> list[nn.Parameter]:
        """Weight, and bias if there is one, as they are set."""
        return [each for each in (self.module.weight, self.module.bias) if each is not None]


class Supernet:
    """The projections that read the layer sites' units, each set to one of several levels.

    Made by `supernet`.

    Parameters
    ----------
    anatomy : Anatomy
        Of the model whose projections are set.
    layer_sites : sequence of LayerSite
        From `unscored_sites`.
    solver : Solver
        How units are chosen and the remaining weights updated.
    offload : {"device", "cpu", "disk"}
        Place of the levels' weights (each level takes half a projection on average) and of hidden
        states; see `Shards`.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        layer_sites: Sequence[LayerSite],
        solver: Solver,
        offload: str = "device",
    ):
        self.anatomy, self.layer_sites = anatomy, layer_sites
        self.solver, self.offload = solver, offload
        self.projections = []  # [site]
        for each in layer_sites:
            module = anatomy.module(each.layer, anatomy.family.consumes[each.site])
            if module.bias is None and solver.updates_bias(module):
                add_bias(module)
            self.projections.append(PrunableProjection(module, offload))

    def fill(
        self,
        windows: CalibrationWindows,
        levels: Sequence[Sequence[int]],
        base: Budget,
        progress: bool = True,
    ) -> None:
        """Compute all levels of all sites in one pass over calibration tokens.

        Parameters
        ----------
        windows : CalibrationWindows
            Calibration tokens, with their weights.
        levels : sequence of sequence of int
            For each site, its levels: ascending, the first 0.
        base : tuple of int
            Level at which every site is set while the layers after it are calibrated.

        Raises
        ------
        ValueError
            If a hidden state is not finite (its layer is named).
        """
        anatomy, hidden = self.anatomy, Shards(self.offload)
        calls = catch_inputs(anatomy.model, windows.batches(), hidden)
        last = max(each.layer for each in self.layer_sites)
        for layer in tqdm(range(last + 1), "supernet", unit="layer", disable=not progress):
            runner = LayerRunner(anatomy, layer, hidden, calls, windows.weights)
            in_layer = [i for i, each in enumerate(self.layer_sites) if each.layer == layer]
            # attention first, as data flows
            for i in sorted(in_layer, key=lambda i: self.layer_sites[i].site == "ffn"):
                if len(levels[i]) > 1:
                    site = self.layer_sites[i].site
                    problem = read_problem(anatomy, runner, layer, site, self.solver)
                    self._solve(self.projections[i], problem, levels[i][1:])
                    self.projections[i].set(base[i])
            if layer < last:
                runner.finish()

    def _solve(
        self, projection: PrunableProjection, problem: Problem, counts: Sequence[int]
    ) -> None:
        """Compute a projection's levels, all in one elimination."""
        updates_bias = self.solver.updates_bias(projection.module)
        for level, elimination in zip(
            counts, solve_levels(problem, counts, self.solver), strict=True
        ):
            update = bias_update(problem, elimination) if updates_bias else 0.0
            projection.add(level, problem.columns(elimination.kept), elimination.W, update)

    def set(self, budget: Budget) -> None:
        """Set every site of the model to its level."""
        for projection, level in zip(self.projections, budget, strict=True):
            if projection.current != level:
                projection.set(level)

    def rises(self, loss: Callable[[], torch.Tensor], below: Budget, above: Budget) -> np.ndarray:
        """Estimate how much a loss rises from one level of each site to a higher one ``[site]``.

        To first order, with one backward pass through the model as it is set:
        ``<∂loss/∂W, W_above - W_below> + <∂loss/∂b, b_above - b_below>``.

        Parameters
        ----------
        loss : callable
            Runs the model and gives a scalar.
        below, above : tuple of int
            The two levels of every site.
        """
        # 1. Gradients of the loss, of all projections at once.
        parameters = [each for projection in self.projections for each in projection.parameters()]
        with torch.enable_grad():
            gradients = iter(torch.autograd.grad(loss(), parameters))
        # 2. Their products with the step from level to level.
        rises = []
        for projection, low, high in zip(self.projections, below, above, strict=True):
            steps = zip(projection.at(high), projection.at(low), strict=True)
            rises.append(sum(_product(next(gradients), *step) for step in steps))
        return np.array(rises)


@torch.no_grad()
def _product(gradient: torch.Tensor, after: torch.Tensor, before: torch.Tensor) -> float:
    """``<gradient, after - before>``, in float32 or better."""
    dtype = torch.promote_types(gradient.dtype, torch.float32)
    return float((gradient.to(dtype) * (after.to(dtype) - before.to(dtype))).sum())


@safe_contextmanager
def supernet(
    model: PreTrainedModel,
    layer_sites: Sequence[LayerSite],
    solver: Solver,
    offload: str = "device",
) -> Iterator[Supernet]:
    """Turn a model into a `Supernet` while inside; afterwards it is what it was, bit for bit."""
    with restore_on_exit(model), inference(model), full_precision():
        model.requires_grad_(False)
        yield Supernet(Anatomy(model), layer_sites, solver, offload)
