"""A model whose every layer can be set to any of several pruned widths, in place and back.

The supernet of Týr-the-Pruner (arXiv 2503.09657): one walk over the calibration tokens gives every
layer's heads and channels the weights they would have at each of several levels. Removed units are
zero columns of the projection that reads them: no shape changes, and a budget costs a few copies.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..calibration import LayerRunner, catch_inputs
from ..checks import restore_on_exit, safe_contextmanager
from ..models import Anatomy, inference, weight_axis
from ..planning import LayerSite
from ..store import Shards
from .budgets import Budget
from .layer import Problem, Solver, bias_shift, problem, solve_levels
from .obs import full_precision


@dataclass(frozen=True)
class Level:
    """What one projection becomes when some of the units it reads leave.

    Parameters
    ----------
    columns : torch.Tensor
        Input features that stay.
    shift : torch.Tensor or None
        Added to the bias ``[output]``.
    """

    columns: torch.Tensor
    shift: torch.Tensor | None


class Supernet:
    """The projections of some groups, and what each is at every level.

    Parameters
    ----------
    anatomy : Anatomy
        Of the model that is set.
    groups : sequence of LayerSite
        From `prunable_sites`.
    counts : sequence of sequence of int
        For each group, the units that leave at every level: ascending, the first 0.
    offload : {"device", "cpu", "disk"}
        Where the levels' weights wait (each level takes half a projection on average); see
        `Shards`.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        groups: Sequence[LayerSite],
        counts: Sequence[Sequence[int]],
        offload: str = "device",
    ):
        consumers = anatomy.family.consumes
        self.modules = [anatomy.module(group.layer, consumers[group.site]) for group in groups]
        self.dense = [(module.weight, module.bias) for module in self.modules]
        self.counts = counts
        self.now = [0] * len(groups)
        self.levels: list[list[Level]] = [[] for _ in groups]
        self.weights = Shards(offload)  # group by group: [output, feature that stays]

    def solve(self, group: int, given: Problem, site: str, options: Solver) -> None:
        """Find a group's levels, all in one elimination."""
        for found in solve_levels(given, site, self.counts[group][1:], options):
            module, columns = self.modules[group], given.units[found.kept].ravel()
            shift = bias_shift(given, found) if options.refits_bias(module) else None
            self.weights[self._key(group, len(self.levels[group]) + 1)] = found.weight.to(
                module.weight.dtype
            )
            self.levels[group].append(Level(columns, shift))

    @torch.no_grad()
    def set(self, group: int, level: int) -> None:
        """Let the model compute with one group at a level."""
        module, (weight, bias) = self.modules[group], self.dense[group]
        if level:
            found, axis = self.levels[group][level - 1], weight_axis(module, "input")
            short = self.weights[self._key(group, level)].movedim(1, axis)
            wide = torch.zeros_like(weight).index_copy_(axis, found.columns, short)
            weight = nn.Parameter(wide, requires_grad=False)
            if found.shift is not None:
                before = torch.zeros_like(found.shift) if bias is None else bias
                bias = nn.Parameter((before + found.shift).to(weight.dtype), requires_grad=False)
        # another Parameter, not another value: the model's own come back untouched
        module.weight, module.bias = weight, bias
        self.now[group] = level

    def set_all(self, budget: Budget) -> None:
        """Let the model compute with every group at its level."""
        for group, level in enumerate(budget):
            if self.now[group] != level:
                self.set(group, level)

    def slopes(self, loss: Callable[[], torch.Tensor], below: Budget) -> tuple[float, np.ndarray]:
        """A loss as the groups are set, and what it would rise by from one level to the next.

        To first order, from one backward pass: ``<∂loss/∂W, W_next - W_below>`` for every group.

        Parameters
        ----------
        loss : callable
            What the model computes, as a scalar.
        below : tuple of int
            The lower of two levels of every group; the rise of a group with one level is 0.

        Returns
        -------
        float, numpy.ndarray
            The loss, and its rises ``[group]``.
        """
        with self._asked() as pairs, torch.enable_grad():
            asked = [each for pair in pairs for each in pair if each is not None]
            value = loss()
            found = iter(torch.autograd.grad(value, asked))
        rises = []
        for group, (level, pair) in enumerate(zip(below, pairs, strict=True)):
            gradients = [None if each is None else next(found) for each in pair]
            rise = value.new_zeros(())
            if level < len(self.levels[group]):
                rise = self._along(group, level + 1, *gradients)
                rise = rise - self._along(group, level, *gradients)
            rises.append(rise.to(value.device))
        return float(value.detach()), np.array(torch.stack(rises).tolist())

    @safe_contextmanager
    def _asked(self) -> Iterator[list[tuple[nn.Parameter, nn.Parameter | None]]]:
        """Every projection's weight and bias, to be differentiated."""
        pairs = []
        with contextlib.ExitStack() as stack:
            for module, levels in zip(self.modules, self.levels, strict=True):
                if module.bias is None and levels and levels[0].shift is not None:
                    stack.callback(setattr, module, "bias", None)
                    zeros = torch.zeros_like(levels[0].shift, dtype=module.weight.dtype)
                    module.bias = nn.Parameter(zeros)
                pairs.append((module.weight, module.bias))
                for each in pairs[-1]:
                    if each is not None:
                        stack.callback(each.requires_grad_(True).requires_grad_, False)
            yield pairs

    def _along(
        self, group: int, level: int, slope: torch.Tensor, shift: torch.Tensor | None
    ) -> torch.Tensor:
        """Product of a group's weight and bias at a level with the loss's slopes."""
        slope = slope.to(torch.promote_types(slope.dtype, torch.float32))
        if not level:
            return (slope * self.dense[group][0].detach()).sum()
        found, axis = self.levels[group][level - 1], weight_axis(self.modules[group], "input")
        kept = slope.movedim(axis, 1)[:, found.columns]
        product = (kept * self.weights[self._key(group, level)]).sum()
        return product if found.shift is None else product + (shift * found.shift).sum()

    def _key(self, group: int, level: int) -> int:
        return group * max(map(len, self.counts)) + level


@safe_contextmanager
def supernet(
    model: PreTrainedModel,
    groups: Sequence[LayerSite],
    counts: Sequence[Sequence[int]],
    offload: str = "device",
) -> Iterator[Supernet]:
    """A model as a supernet; on leaving it is what it was, bit for bit. `find_levels` fills it.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A supported causal language model.
    groups, counts, offload
        See `Supernet`.
    """
    net = Supernet(Anatomy(model), groups, counts, offload)
    with restore_on_exit(model), inference(model), full_precision():
        model.requires_grad_(False)  # `slopes` asks for the gradients that it needs
        yield net


def find_levels(
    model: PreTrainedModel,
    net: Supernet,
    windows: Sequence[torch.Tensor],
    groups: Sequence[LayerSite],
    base: Budget,
    options: Solver,
    offload: str = "device",
    progress: bool = True,
) -> None:
    """Find every level of every group in one walk.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        That of the supernet.
    net : Supernet
        Filled.
    windows : sequence of torch.Tensor
        Calibration tokens ``[window, token]``.
    groups, offload
        See `Supernet`.
    base : tuple of int
        The level of every group that the layers behind it are calibrated on.
    options : Solver
        How columns are chosen and the rest refitted.
    progress : bool
        Show a progress bar.

    Raises
    ------
    ValueError
        If a hidden state is not finite (its layer is named).
    """
    hidden = Shards(offload)
    anatomy, calls = (
        Anatomy(model),
        catch_inputs(model, [{"input_ids": ids} for ids in windows], hidden),
    )
    last = max(group.layer for group in groups)
    for layer in tqdm(range(last + 1), "supernet", unit="layer", disable=not progress):
        one = LayerRunner(anatomy, layer, hidden, calls)
        parts = [index for index, group in enumerate(groups) if group.layer == layer]
        for index in sorted(parts, key=lambda i: groups[i].site == "ffn"):  # as the data flows
            site, total = groups[index].site, len(groups[index])
            if len(net.counts[index]) > 1:
                net.solve(index, problem(anatomy, one, layer, site, total, options), site, options)
                net.set(index, base[index])
        if layer < last:
            one.finish()
