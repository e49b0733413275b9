"""Budgets: how many units to remove from every layer site, so that one total size is reached.

A layer site has a few levels, numbers of units to remove; a budget picks one level for each site.
Between levels, a budget is an array of parameters to remove ``[site]``, not always whole units.
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
    """The levels of every layer site, and the size that a budget must reach.

    Parameters
    ----------
    layer_sites : sequence of LayerSite
        From `unscored_sites`.
    steps : sequence of int
        For each site, a number by which the number of kept units must be divisible.
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
        """Make evenly spaced levels, and one at each count of the starts.

        Parameters
        ----------
        starts : iterable of sequence of int
            Units to remove from each site.
        levels : int
            Intervals between keeping all units of a site and keeping only one step of them.
        """
        counts = []
        by_site = zip(*starts, strict=True)  # [site][start]
        for layer_site, step, at_starts in zip(layer_sites, steps, by_site, strict=True):
            total = len(layer_site)
            kept = [round(total * i / levels / step) * step for i in range(levels + 1)]
            counts.append(sorted({0, *at_starts, *(total - max(n, step) for n in kept)}))
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
        """Units to remove from each site, without the FFN channels beyond the target.

        As long as the budget removes more than the target, one step of channels at a time is kept
        instead, from layer to layer in turn.
        """
        counts = self.to_counts(budget)
        spare = self.removed(budget).sum() - self.target  # parameters beyond the target
        before = None
        while counts != before:
            before = list(counts)
            for i, (each, step) in enumerate(zip(self.layer_sites, self.steps, strict=True)):
                if each.site == "ffn" and counts[i] and spare >= each.cost * step:
                    counts[i] -= step
                    spare -= each.cost * step
        return counts

    def projected(self, removed: np.ndarray) -> np.ndarray:
        """Project parameters to remove, ``r [site]``, on those in range that reach the target.

        ``argmin_r' Σ_i (r'_i - r_i)² / s_i``, with *s* the sites' sizes, is
        ``r'_i = clip(r_i + λ s_i, 0, largest_i)``. λ is found by bisection.
        """
        low, high = -(removed / self.sizes).max(), ((self.largest - removed) / self.sizes).max()
        for _ in range(60):
            middle = (low + high) / 2  # λ
            total = np.clip(removed + middle * self.sizes, 0, self.largest).sum()
            low, high = (low, middle) if total >= self.target else (middle, high)
        return np.clip(removed + high * self.sizes, 0, self.largest)

    def levels_below(self, removed: np.ndarray) -> Budget:
        """For each site, the highest level below `removed` that has a next level."""
        pairs = zip(self.level_sizes, removed, strict=True)
        return tuple(max(int(np.searchsorted(sizes[:-1], size)) - 1, 0) for sizes, size in pairs)

    def sampled(self, removed: np.ndarray, below: Budget, uniform: np.ndarray) -> Budget:
        """Round each site at random to the level below or the next; the mean is `removed`.

        Parameters
        ----------
        removed : numpy.ndarray
            Parameters to remove from each site ``[site]``.
        below : tuple of int
            From `levels_below`.
        uniform : numpy.ndarray
            Random numbers, uniform in [0, 1) ``[site]``.
        """
        # Probability of the next level: how far `removed` is on the way to it.
        up = uniform < (removed - self.removed(below)) / self.gaps(below)
        return tuple(np.add(below, up).tolist())

    def nearest(self, removed: np.ndarray, bins: int = 10_000) -> Budget:
        """The nearest budget of whole levels that removes enough.

        Minimises ``Σ_i (removed by i's level - r_i)² / s_i`` with *s* the sites' sizes: a knapsack,
        solved by dynamic programming. The target is divided into bins; levels are rounded down to
        bins. If the target is nearly all that can be removed, rounding may exclude every budget:
        then the result removes too little.
        """
        # 1. Sizes of all levels in bins.
        need, bin_size = np.arange(bins + 1), max(self.target, 1) / bins
        level_bins = [(sizes / bin_size).astype(int) for sizes in self.level_sizes]  # [site][level]
        # 2. Site after site; price[n] is the least cost of removing n bins from the sites so far.
        price = np.where(need > 0, np.inf, 0.0)  # [bin]
        choices = []  # [site][bin]: the level that gives the least cost
        for i, sizes in enumerate(self.level_sizes):
            costs = (sizes - removed[i]) ** 2 / self.sizes[i]  # [level]
            totals = [
                cost + price[np.maximum(need - n, 0)]
                for cost, n in zip(costs, level_bins[i], strict=True)
            ]  # [level][bin]
            choices.append(np.argmin(totals, axis=0))
            price = np.min(totals, axis=0)
        # 3. Read the choices back, from the last site to the first.
        budget, remaining = [], bins
        for choice, n in zip(reversed(choices), reversed(level_bins), strict=True):
            budget.append(int(choice[remaining]))
            remaining = max(remaining - n[budget[-1]], 0)
        return tuple(reversed(budget))
