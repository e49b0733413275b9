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

from .budgets import Budget
from .compensation import Problem, Solver, bias_shift, problem, solve_levels
from .elimination import full_precision
from .families import Anatomy, weight_axis
from .layerwise import LayerPass, enter
from .runtime import inference
from .schedules import Group
from .shards import Shards


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
    groups : sequence of Group
        From `prunable`.
    counts : sequence of sequence of int
        For each group, the units that leave at every level: ascending, the first 0.
    offload : {"device", "cpu", "disk"}
        Where the levels' weights wait; see `Shards`.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        groups: Sequence[Group],
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
        weights = [module.weight for module in self.modules]
        biases = [module.bias for module in self.modules if module.bias is not None]
        with _asked([*weights, *biases]) as asked:
            value = loss()
            found = iter(torch.autograd.grad(value, asked))
        slopes = [next(found) for _ in weights]
        shifts = [None if module.bias is None else next(found) for module in self.modules]
        rises = [
            self._along(group, level + 1, *gradients) - self._along(group, level, *gradients)
            if level < len(self.levels[group])
            else value.new_zeros(())
            for group, (level, *gradients) in enumerate(zip(below, slopes, shifts, strict=True))
        ]
        return float(value.detach()), np.array(torch.stack(rises).tolist())

    def _along(
        self, group: int, level: int, slope: torch.Tensor, shift: torch.Tensor | None
    ) -> torch.Tensor:
        """Product of a group's weight and bias at a level with the loss's slopes."""
        precise = torch.promote_types(slope.dtype, torch.float32)
        if not level:
            return (slope * self.dense[group][0].detach()).sum(dtype=precise)
        found, axis = self.levels[group][level - 1], weight_axis(self.modules[group], "input")
        kept = slope.movedim(axis, 1)[:, found.columns]
        product = (kept * self.weights[self._key(group, level)]).sum(dtype=precise)
        if shift is None or found.shift is None:
            return product
        return product + (shift * found.shift).sum(dtype=precise)

    def _key(self, group: int, level: int) -> int:
        return group * max(map(len, self.counts)) + level


@contextlib.contextmanager
def _asked(parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Let gradients of these parameters be computed, whatever they ask for themselves."""
    before = [parameter.requires_grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        with torch.enable_grad():
            yield parameters
    finally:
        for parameter, flag in zip(parameters, before, strict=True):
            parameter.requires_grad_(flag)


@contextlib.contextmanager
def supernet(
    model: PreTrainedModel,
    windows: Sequence[torch.Tensor],
    groups: Sequence[Group],
    counts: Sequence[Sequence[int]],
    base: Budget,
    options: Solver,
    offload: str = "device",
    progress: bool = True,
) -> Iterator[Supernet]:
    """Find every level in one walk; on leaving, the model is what it was, bit for bit.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A supported causal language model.
    windows : sequence of torch.Tensor
        Calibration tokens ``[window, token]``.
    groups, counts, offload
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
    net = Supernet(Anatomy(model), groups, counts, offload)
    try:
        with inference(model), full_precision():
            _walk(model, windows, net, groups, base, options, Shards(offload), progress)
            yield net
    finally:
        net.set_all((0,) * len(groups))


def _walk(model, windows, net, groups, base, options, hidden: Shards, progress) -> None:
    anatomy, calls = Anatomy(model), enter(model, [{"input_ids": ids} for ids in windows], hidden)
    last = max(group.layer for group in groups)
    for layer in tqdm(range(last + 1), "supernet", unit="layer", disable=not progress):
        one = LayerPass(anatomy, layer, hidden, calls)
        parts = [index for index, group in enumerate(groups) if group.layer == layer]
        for index in sorted(parts, key=lambda i: groups[i].site == "ffn"):  # as the data flows
            site, total = groups[index].site, len(groups[index])
            if len(net.counts[index]) > 1:
                net.solve(index, problem(anatomy, one, layer, site, total, options), site, options)
                net.set(index, base[index])
        if layer < last:
            one.finish()
