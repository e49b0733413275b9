"""Budgets of one size: how many units to remove from every layer site, in levels and in between.

A budget is a level for every layer site; a site's levels are numbers of units to remove.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ..planning import LayerSite

Budget = tuple[int, ...]  # a level of every layer site


@dataclass(frozen=True)
class Budgets:
    """All budgets that remove enough, of which each level is one of a few.

    Parameters
    ----------
    layer_sites : sequence of LayerSite
        From `unscored_sites`.
    steps : sequence of int
        For each site, the divisor of the number of kept units.
    counts : list of list of int
        For each site, the units removed at every level: ascending, the first 0.
    target : float
        Parameters to remove.
    """

    layer_sites: Sequence[LayerSite]
    steps: Sequence[int]
    counts: list[list[int]]
    target: float

    @classmethod
    def around(
        cls,
        starts: Iterable[Sequence[int]],
        layer_sites: Sequence[LayerSite],
        steps: Sequence[int],
        levels: int,
        target: float,
    ) -> Budgets:
        """Levels on a grid from all units to one step, and at the counts of some starts."""
        counts = []
        for each, step, given in zip(layer_sites, steps, zip(*starts, strict=True), strict=True):
            kept = [round(len(each) * i / levels / step) * step for i in range(levels + 1)]
            counts.append(sorted({0, *given, *(len(each) - max(n, step) for n in kept)}))
        return cls(layer_sites, steps, counts, target)

    @cached_property
    def sizes(self) -> np.ndarray:
        """Parameters of every site ``[site]``."""
        return np.array([len(each) * each.cost for each in self.layer_sites], dtype=float)

    @cached_property
    def level_sizes(self) -> list[np.ndarray]:
        """Parameters removed from every site at its levels ``[site][level]``."""
        pairs = zip(self.counts, self.layer_sites, strict=True)
        return [np.array(counts) * float(each.cost) for counts, each in pairs]

    @cached_property
    def largest(self) -> np.ndarray:
        """Parameters that can be removed from every site ``[site]``."""
        return np.array([sizes[-1] for sizes in self.level_sizes])

    def from_counts(self, counts: Sequence[int]) -> Budget:
        """The budget that removes so many units from each site."""
        return tuple(levels.index(n) for levels, n in zip(self.counts, counts, strict=True))

    def to_counts(self, budget: Budget) -> list[int]:
        """Units removed from each site."""
        return [levels[level] for levels, level in zip(self.counts, budget, strict=True)]

    def removed(self, budget: Budget) -> np.ndarray:
        """Parameters removed from each site ``[site]``."""
        pairs = zip(self.level_sizes, budget, strict=True)
        return np.array([sizes[level] for sizes, level in pairs])

    def gaps(self, below: Budget) -> np.ndarray:
        """Parameters between a level of each site and the next; infinite if there is none."""
        pairs = zip(self.level_sizes, below, strict=True)
        return np.array([np.append(sizes, np.inf)[n + 1] - sizes[n] for sizes, n in pairs])

    def trimmed(self, budget: Budget) -> list[int]:
        """Units removed from each site, less the FFN channels that are not needed for the target.

        They are given back one step at a time, in all layers alike.
        """
        counts, spare = self.to_counts(budget), self.removed(budget).sum() - self.target
        before = None
        while counts != before:
            before = list(counts)
            for i, (each, step) in enumerate(zip(self.layer_sites, self.steps, strict=True)):
                if each.site == "ffn" and counts[i] and spare >= each.cost * step:
                    counts[i] -= step
                    spare -= each.cost * step
        return counts

    def projected(self, removed: np.ndarray) -> np.ndarray:
        """The nearest parameters to remove that are in range and add up to the target.

        All sites move by the same share of themselves, found by bisection.
        """
        low, high = -(removed / self.sizes).max(), ((self.largest - removed) / self.sizes).max()
        for _ in range(60):
            middle = (low + high) / 2
            total = np.clip(removed + middle * self.sizes, 0, self.largest).sum()
            low, high = (low, middle) if total >= self.target else (middle, high)
        return np.clip(removed + high * self.sizes, 0, self.largest)

    def levels_below(self, removed: np.ndarray) -> Budget:
        """The last level of each site that removes less, but not the highest: one is above it."""
        pairs = zip(self.level_sizes, removed, strict=True)
        return tuple(max(int(np.searchsorted(sizes[:-1], size)) - 1, 0) for sizes, size in pairs)

    def sampled(self, removed: np.ndarray, below: Budget, uniform: np.ndarray) -> Budget:
        """For every site the level below or the next, so that the mean number is `removed`.

        Parameters
        ----------
        removed : numpy.ndarray
            Parameters to remove from each site ``[site]``.
        below : tuple of int
            The levels below.
        uniform : numpy.ndarray
            Uniform in [0, 1) ``[site]``: the next level if below the share of the way to it.
        """
        up = uniform < (removed - self.removed(below)) / self.gaps(below)
        return tuple(np.add(below, up).tolist())

    def nearest(self, removed: np.ndarray, bins: int = 10_000) -> Budget:
        """The nearest budget that removes enough: least squared difference over a site's size.

        A knapsack, over sizes in shares of the target, rounded down. If the target is nearly all
        there is, rounding may exclude all budgets: then it is one that removes too little.
        """
        # price[n]: least cost of removing n bins with the sites seen so far
        need, unit = np.arange(bins + 1), max(self.target, 1) / bins
        price = np.where(need > 0, np.inf, 0.0)
        level_bins = [(sizes / unit).astype(int) for sizes in self.level_sizes]
        choices = []
        for i, sizes in enumerate(self.level_sizes):
            costs = (sizes - removed[i]) ** 2 / self.sizes[i]  # [level]
            totals = [
                cost + price[np.maximum(need - n, 0)]
                for cost, n in zip(costs, level_bins[i], strict=True)
            ]  # [level][bin]
            choices.append(np.argmin(totals, axis=0))
            price = np.min(totals, axis=0)
        # read the choices back, from the last site to the first
        budget, remaining = [], bins
        for choice, n in zip(reversed(choices), reversed(level_bins), strict=True):
            budget.append(int(choice[remaining]))
            remaining = max(remaining - n[budget[-1]], 0)
        return tuple(reversed(budget))
