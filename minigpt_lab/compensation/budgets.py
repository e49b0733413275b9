"""Budgets of one size: how many units leave every group, in levels and in between.

A budget is a level for every group of units; a group's levels are numbers of units that leave.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ..planning import LayerSite

Budget = tuple[int, ...]  # a level of every group


@dataclass(frozen=True)
class Budgets:
    """All budgets that remove enough, of which each level is one of a few.

    Parameters
    ----------
    groups : sequence of LayerSite
        From `prunable_sites`.
    steps : sequence of int
        For each group, what the number of units that stay must be a multiple of.
    counts : list of list of int
        For each group, the units that leave at every level: ascending, the first 0.
    leave : float
        Parameters that are to leave.
    """

    groups: Sequence[LayerSite]
    steps: Sequence[int]
    counts: list[list[int]]
    leave: float

    @classmethod
    def around(
        cls,
        starts: Iterable[Sequence[int]],
        groups: Sequence[LayerSite],
        steps: Sequence[int],
        levels: int,
        leave: float,
    ) -> Budgets:
        """With levels on a grid from everything to one step, and at the counts of some starts."""
        counts = []
        for group, step, given in zip(groups, steps, zip(*starts, strict=True), strict=True):
            stay = [round(len(group) * i / levels / step) * step for i in range(levels + 1)]
            counts.append(sorted({0, *given, *(len(group) - max(n, step) for n in stay)}))
        return cls(groups, steps, counts, leave)

    @cached_property
    def whole(self) -> np.ndarray:
        """Parameters of every group ``[group]``."""
        return np.array([len(group) * group.cost for group in self.groups], dtype=float)

    @cached_property
    def sizes(self) -> list[np.ndarray]:
        """Parameters that leave every group at its levels ``[group][level]``."""
        pairs = zip(self.counts, self.groups, strict=True)
        return [np.array(counts) * float(group.cost) for counts, group in pairs]

    @cached_property
    def most(self) -> np.ndarray:
        """Parameters that can leave every group ``[group]``."""
        return np.array([sizes[-1] for sizes in self.sizes])

    def budget(self, counts: Sequence[int]) -> Budget:
        """The budget at which so many units leave each group."""
        return tuple(levels.index(n) for levels, n in zip(self.counts, counts, strict=True))

    def units(self, budget: Budget) -> list[int]:
        """Units that leave each group."""
        return [levels[level] for levels, level in zip(self.counts, budget, strict=True)]

    def gone(self, budget: Budget) -> np.ndarray:
        """Parameters that leave each group ``[group]``."""
        return np.array([sizes[level] for sizes, level in zip(self.sizes, budget, strict=True)])

    def filled(self, budget: Budget) -> list[int]:
        """Units that leave each group, FFN channels beyond need given back in all layers alike."""
        counts, spare = self.units(budget), self.gone(budget).sum() - self.leave
        before = None
        while counts != before:
            before = list(counts)
            for index, (group, step) in enumerate(zip(self.groups, self.steps, strict=True)):
                if group.site == "ffn" and counts[index] and spare >= group.cost * step:
                    counts[index] -= step
                    spare -= group.cost * step
        return counts

    def rises(self, below: Budget) -> np.ndarray:
        """Parameters between a level of each group and the next; infinite if there is none."""
        pairs = zip(self.sizes, below, strict=True)
        return np.array([np.append(sizes, np.inf)[n + 1] - sizes[n] for sizes, n in pairs])

    def projected(self, gone: np.ndarray) -> np.ndarray:
        """Of parameters to leave each group, the nearest in range that add up to what is to leave.

        All groups move by the same share of themselves.
        """
        low, high = -(gone / self.whole).max(), ((self.most - gone) / self.whole).max()
        for _ in range(60):
            middle = (low + high) / 2
            enough = np.clip(gone + middle * self.whole, 0, self.most).sum() >= self.leave
            low, high = (low, middle) if enough else (middle, high)
        return np.clip(gone + high * self.whole, 0, self.most)

    def below(self, gone: np.ndarray) -> Budget:
        """The last level of each group that removes less, but not the highest: one is above it."""
        pairs = zip(self.sizes, gone, strict=True)
        return tuple(max(int(np.searchsorted(sizes[:-1], size)) - 1, 0) for sizes, size in pairs)

    def drawn(self, gone: np.ndarray, below: Budget, chances: np.ndarray) -> Budget:
        """For every group the level below or the next, so that on average as much leaves.

        Parameters
        ----------
        gone : numpy.ndarray
            Parameters that leave each group ``[group]``.
        below : tuple of int
            The levels below.
        chances : numpy.ndarray
            Uniform in [0, 1) ``[group]``: the next level if below the share of the way to it.
        """
        up = chances < (gone - self.gone(below)) / self.rises(below)
        return tuple(np.add(below, up).tolist())

    def nearest(self, gone: np.ndarray, bins: int = 10_000) -> Budget:
        """The nearest budget that removes enough: least squared difference over a group's size.

        A knapsack, over sizes in shares of what is to leave, rounded down. If the size is nearly
        all there is, rounding may leave no budget: then it is one that removes too little.
        """
        need, unit = np.arange(bins + 1), max(self.leave, 1) / bins
        price = np.where(need > 0, np.inf, 0.0)  # of removing so much with the groups seen so far
        steps = [(sizes / unit).astype(int) for sizes in self.sizes]
        choices = []
        for sizes, size, whole, parts in zip(self.sizes, gone, self.whole, steps, strict=True):
            costs = (sizes - size) ** 2 / whole
            totals = [
                cost + price[np.maximum(need - part, 0)]
                for cost, part in zip(costs, parts, strict=True)
            ]
            choices.append(np.argmin(totals, axis=0))
            price = np.min(totals, axis=0)
        budget, left = [], bins
        for choice, parts in zip(reversed(choices), reversed(steps), strict=True):
            budget.append(int(choice[left]))
            left = max(left - parts[budget[-1]], 0)
        return tuple(reversed(budget))
