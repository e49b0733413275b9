"""Budgets: how many units to remove from every layer site, so that one total size is reached.

A budget picks one of a few numbers of units for each site, its *levels*. A descent goes between
levels: there a point is an array of parameters to remove ``[site]``, not always whole units.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ..planning import LayerSite

Budget = tuple[int, ...]  # units to remove from every layer site


@dataclass(frozen=True)
class Budgets:
    """The levels of every layer site, and the size that a budget must reach.

    Parameters
    ----------
    layer_sites : sequence of LayerSite
        From `unscored_sites`.
    steps : sequence of int
        For each site, a number by which the number of kept units must be divisible.
    levels : list of list of int
        For each site, the numbers of units that may be removed: ascending, the first 0.
    target : float
        Parameters to remove.
    """

    layer_sites: Sequence[LayerSite]
    steps: Sequence[int]
    levels: list[list[int]]
    target: float

    @classmethod
    def around(
        cls,
        starts: Iterable[Budget],
        layer_sites: Sequence[LayerSite],
        steps: Sequence[int],
        intervals: int,
        target: float,
        drop_blocks: bool = False,
    ) -> Budgets:
        """Make evenly spaced levels, and one at each number of the starts.

        Parameters
        ----------
        intervals : int
            Intervals between keeping all units of a site and keeping only one step of them.
        drop_blocks : bool
            Whether all units is a level too.
        """
        levels = []
        by_site = zip(*starts, strict=True)  # [site][start]
        for layer_site, step, at_starts in zip(layer_sites, steps, by_site, strict=True):
            total = len(layer_site)
            kept = [round(total * i / intervals / step) * step for i in range(intervals + 1)]
            spaced = [total - max(n, step) for n in kept]
            levels.append(sorted({0, *at_starts, *spaced, *[total] * drop_blocks}))
        return cls(layer_sites, steps, levels, target)

    @cached_property
    def sizes(self) -> np.ndarray:
        """Parameters of all units ``[site]``."""
        return self.removed(tuple(map(len, self.layer_sites)))

    @cached_property
    def level_sizes(self) -> list[np.ndarray]:
        """Parameters that each level removes ``[site][level]``."""
        pairs = zip(self.layer_sites, self.levels, strict=True)
        return [np.array([float(each.removed(n)) for n in levels]) for each, levels in pairs]

    @cached_property
    def largest(self) -> np.ndarray:
        """Parameters that can be removed ``[site]``."""
        return np.array([sizes[-1] for sizes in self.level_sizes])

    def removed(self, budget: Budget) -> np.ndarray:
        """Parameters that a budget removes ``[site]``."""
        pairs = zip(self.layer_sites, budget, strict=True)
        return np.array([float(each.removed(n)) for each, n in pairs])

    def trimmed(self, budget: Budget) -> Budget:
        """The budget without the FFN channels beyond the target: no longer one of levels.

        As long as it removes more than the target, one step of channels at a time is kept instead,
        from layer to layer in turn; none of a dropped FFN.
        """
        counts, before = list(budget), None
        spare = self.removed(budget).sum() - self.target  # parameters beyond the target
        while counts != before:
            before = list(counts)
            for i, (each, step) in enumerate(zip(self.layer_sites, self.steps, strict=True)):
                movable = each.site == "ffn" and 0 < counts[i] < len(each)
                if movable and spare >= each.cost * step:
                    counts[i] -= step
                    spare -= each.cost * step
        return tuple(counts)

    def projected(self, removed: np.ndarray) -> np.ndarray:
        """Project parameters to remove, ``r [site]``, on those in range that reach the target.

        ``argmin_r' Σ_i (r'_i - r_i)² / s_i``, with *s* the sites' sizes, is
        ``r'_i = clip(r_i + λ s_i, 0, largest_i)``. λ is computed by bisection.
        """
        low, high = -(removed / self.sizes).max(), ((self.largest - removed) / self.sizes).max()
        for _ in range(60):
            middle = (low + high) / 2  # λ
            total = np.clip(removed + middle * self.sizes, 0, self.largest).sum()
            low, high = (low, middle) if total >= self.target else (middle, high)
        return np.clip(removed + high * self.sizes, 0, self.largest)

    def neighbours(self, removed: np.ndarray) -> tuple[Budget, Budget]:
        """For each site, the levels below and above; the same one twice if there is no other."""
        below, above = [], []
        for levels, sizes, size in zip(self.levels, self.level_sizes, removed, strict=True):
            i = bisect.bisect_left(sizes, size, hi=len(levels) - 1)
            pair = levels[max(i - 1, 0) :][:2]
            below.append(pair[0])
            above.append(pair[-1])
        return tuple(below), tuple(above)

    def sampled(self, removed: np.ndarray, uniform: np.ndarray) -> Budget:
        """Round each site at random to the level below or above; the mean is `removed`.

        Parameters
        ----------
        removed : numpy.ndarray
            Parameters to remove ``[site]``.
        uniform : numpy.ndarray
            Random numbers, uniform in [0, 1) ``[site]``.
        """
        below, above = self.neighbours(removed)
        # Probability of the level above: how far `removed` is on the way to it.
        gap = self.removed(above) - self.removed(below)
        up = uniform * gap < removed - self.removed(below)
        return tuple(np.where(up, above, below).tolist())

    def nearest(self, removed: np.ndarray, bins: int = 10_000) -> Budget:
        """The nearest budget that removes enough.

        Minimises ``Σ_i (removed by i's level - r_i)² / s_i`` with *s* the sites' sizes: a knapsack,
        solved by dynamic programming. The target is divided into bins; levels are rounded down to
        bins. If the target is nearly all that can be removed, rounding may exclude every budget:
        then the result removes too little.
        """
        # 1. Sizes of all levels, in parameters and in bins [site][level].
        need, bin_size = np.arange(bins + 1), max(self.target, 1) / bins
        level_bins = [(sizes / bin_size).astype(int) for sizes in self.level_sizes]
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
        for i in reversed(range(len(choices))):
            level = choices[i][remaining]
            budget.append(self.levels[i][level])
            remaining = max(remaining - level_bins[i][level], 0)
        return tuple(reversed(budget))
