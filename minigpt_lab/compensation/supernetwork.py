"""Supernet: a model in which every layer can be set to one of several pruned widths, in place.

The supernet of Týr-the-Pruner (arXiv 2503.09657): one pass over the calibration tokens gives every
layer's heads and channels updated weights at each of several levels. Removed units are zero columns
of the projection that reads them. So shapes stay the same, and to set a budget takes a few copies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

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
from .obs import full_precision
from .solver import Problem, Solver, bias_update, read_problem, solve_levels


@dataclass(frozen=True)
class Level:
    """A projection after some of the units that it reads were removed.

    Parameters
    ----------
    columns : torch.Tensor
        Kept input features ``[kept]``.
    bias_update : torch.Tensor or None
        What is added to the bias ``[out]``.
    """

    columns: torch.Tensor
    bias_update: torch.Tensor | None


class Supernet:
    """The projections that read the layer sites' units, each set to one of several levels.

    Made by `supernet`. Level 0 is the dense projection. Sites are numbered *i* as in `layer_sites`.

    Parameters
    ----------
    anatomy : Anatomy
        Of the model whose projections are set.
    layer_sites : sequence of LayerSite
        From `unscored_sites`.
    counts : sequence of sequence of int
        For each site, the units removed at every level: ascending, the first 0.
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
        counts: Sequence[Sequence[int]],
        solver: Solver,
        offload: str = "device",
    ):
        self.anatomy, self.layer_sites, self.counts = anatomy, layer_sites, counts
        self.solver, self.offload = solver, offload
        readers = anatomy.family.consumes
        self.modules = [anatomy.module(each.layer, readers[each.site]) for each in layer_sites]
        for module in self.modules:
            if module.bias is None and solver.updates_bias(module):
                add_bias(module)
        # the model's own parameters: `set` puts others in their place
        self.dense = [(module.weight, module.bias) for module in self.modules]
        for parameter in self.parameters():
            parameter.requires_grad_(True)
        self.current = [0] * len(layer_sites)  # level of every site
        self.levels: list[list[Level]] = [[] for _ in layer_sites]  # [site][level - 1]
        self.weights = Shards(offload)  # by site and level: [out, kept]

    def parameters(self) -> list[nn.Parameter]:
        """Weights and biases of the projections at their current levels."""
        pairs = [(module.weight, module.bias) for module in self.modules]
        return [each for pair in pairs for each in pair if each is not None]

    def fill(self, windows: Sequence[torch.Tensor], base: Budget, progress: bool = True) -> None:
        """Compute all levels of all sites in one pass over calibration tokens.

        Parameters
        ----------
        windows : sequence of torch.Tensor
            Tokens ``[window, token]``.
        base : tuple of int
            Level at which every site is set while the layers after it are calibrated.

        Raises
        ------
        ValueError
            If a hidden state is not finite (its layer is named).
        """
        anatomy, hidden = self.anatomy, Shards(self.offload)
        calls = catch_inputs(anatomy.model, [{"input_ids": ids} for ids in windows], hidden)
        last = max(each.layer for each in self.layer_sites)
        for layer in tqdm(range(last + 1), "supernet", unit="layer", disable=not progress):
            runner = LayerRunner(anatomy, layer, hidden, calls)
            in_layer = [i for i, each in enumerate(self.layer_sites) if each.layer == layer]
            # attention first, as data flows
            for i in sorted(in_layer, key=lambda i: self.layer_sites[i].site == "ffn"):
                if len(self.counts[i]) > 1:
                    site = self.layer_sites[i].site
                    self._solve(i, read_problem(anatomy, runner, layer, site, self.solver))
                    self.set(i, base[i])
            if layer < last:
                runner.finish()

    def _solve(self, i: int, problem: Problem) -> None:
        """Compute the levels of site *i*, all in one elimination."""
        module = self.modules[i]
        eliminations = solve_levels(problem, self.counts[i][1:], self.solver)
        for level, elimination in enumerate(eliminations, 1):
            updates_bias = self.solver.updates_bias(module)
            update = bias_update(problem, elimination) if updates_bias else None
            self.weights[self._key(i, level)] = elimination.W.to(module.weight.dtype)
            self.levels[i].append(Level(problem.columns(elimination.kept), update))

    @torch.no_grad()
    def weight(self, i: int, level: int) -> torch.Tensor:
        """Weight of site *i* at a level, zero in the columns of the removed units."""
        W, axis = self.dense[i][0], weight_axis(self.modules[i], "input")
        if level == 0:
            return W
        W_kept = self.weights[self._key(i, level)].movedim(1, axis)
        return torch.zeros_like(W).index_copy_(axis, self.levels[i][level - 1].columns, W_kept)

    @torch.no_grad()
    def bias(self, i: int, level: int) -> torch.Tensor | None:
        """Bias of site *i* at a level."""
        bias = self.dense[i][1]
        update = self.levels[i][level - 1].bias_update if level else None
        return bias if update is None else (bias + update).to(bias.dtype)

    def set(self, i: int, level: int) -> None:
        """Set site *i* of the model to a level."""
        module, (W, bias) = self.modules[i], self.dense[i]
        # new Parameters instead of new values, so that the model's own stay untouched
        if level:
            W = nn.Parameter(self.weight(i, level))
            bias = None if bias is None else nn.Parameter(self.bias(i, level))
        module.weight, module.bias = W, bias
        self.current[i] = level

    def set_all(self, budget: Budget) -> None:
        """Set every site of the model to its level."""
        for i, level in enumerate(budget):
            if self.current[i] != level:
                self.set(i, level)

    def slopes(self, loss: Callable[[], torch.Tensor], below: Budget) -> np.ndarray:
        """Estimate how much a loss rises from one level of each site to the next.

        To first order, with one backward pass through the model as it is set:
        ``<∂loss/∂W, W_next - W_below> + <∂loss/∂b, b_next - b_below>``.

        Parameters
        ----------
        loss : callable
            Runs the model and gives a scalar.
        below : tuple of int
            The lower of two levels of every site.

        Returns
        -------
        numpy.ndarray
            Rises ``[site]``; 0 where there is no next level.
        """
        # 1. Gradients of the loss, of all projections at once.
        with torch.enable_grad():
            gradients = iter(torch.autograd.grad(loss(), self.parameters()))
        # 2. Their products with the step from level to level.
        rises = []
        for i, (module, level) in enumerate(zip(self.modules, below, strict=True)):
            grad_W = next(gradients)
            grad_b = None if module.bias is None else next(gradients)
            rise = 0.0
            if level + 1 < len(self.counts[i]):
                rise += _product(grad_W, self.weight(i, level + 1), self.weight(i, level))
                if grad_b is not None:
                    rise += _product(grad_b, self.bias(i, level + 1), self.bias(i, level))
            rises.append(rise)
        return np.array(rises)

    def _key(self, i: int, level: int) -> int:
        """Index of a site's level in `weights`."""
        return i * max(map(len, self.counts)) + level


@torch.no_grad()
def _product(gradient: torch.Tensor, after: torch.Tensor, before: torch.Tensor) -> float:
    """``<gradient, after - before>``, in float32 or better."""
    dtype = torch.promote_types(gradient.dtype, torch.float32)
    return float((gradient.to(dtype) * (after.to(dtype) - before.to(dtype))).sum())


@safe_contextmanager
def supernet(
    model: PreTrainedModel,
    layer_sites: Sequence[LayerSite],
    counts: Sequence[Sequence[int]],
    solver: Solver,
    offload: str = "device",
) -> Iterator[Supernet]:
    """Turn a model into a `Supernet` while inside; afterwards it is what it was, bit for bit."""
    with restore_on_exit(model), inference(model), full_precision():
        model.requires_grad_(False)
        yield Supernet(Anatomy(model), layer_sites, counts, solver, offload)
