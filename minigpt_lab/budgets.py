"""Budgets of one size: the cheapest by an additive model, and neighbours.

A budget is a level for every group of units; a group's levels are numbers of units that leave.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .schedules import Group

Budget = tuple[int, ...]  # a level of every group


@dataclass(frozen=True)
class Budgets:
    """All budgets that remove enough, of which each level is one of a few.

    Parameters
    ----------
    groups : sequence of Group
        From `prunable`.
    steps : sequence of int
        For each group, what the number of units that stay must be a multiple of.
    counts : list of list of int
        For each group, the units that leave at every level: ascending, the first 0.
    leave : float
        Parameters that are to leave.
    """

    groups: Sequence[Group]
    steps: Sequence[int]
    counts: list[list[int]]
    leave: float

    @classmethod
    def around(
        cls,
        starts: Iterable[Sequence[int]],
        groups: Sequence[Group],
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

    def budget(self, counts: Sequence[int]) -> Budget:
        """The budget at which so many units leave each group."""
        return tuple(levels.index(n) for levels, n in zip(self.counts, counts, strict=True))

    def units(self, budget: Budget) -> list[int]:
        """Units that leave each group."""
        return [levels[level] for levels, level in zip(self.counts, budget, strict=True)]

    def removed(self, budget: Budget) -> int:
        """Parameters that leave."""
        gone = zip(self.groups, self.units(budget), strict=True)
        return sum(group.cost * count for group, count in gone)

    def trimmed(self, budget: Budget, order: Iterable[int]) -> Budget:
        """Without the levels that are not needed for the size, in some order of groups."""
        budget, spare = list(budget), self.removed(budget) - self.leave
        for index in order:
            counts, cost = self.counts[index], self.groups[index].cost
            while (level := budget[index]) and spare >= cost * (counts[level] - counts[level - 1]):
                spare -= cost * (counts[level] - counts[level - 1])
                budget[index] -= 1
        return tuple(budget)

    def filled(self, budget: Budget) -> list[int]:
        """Units that leave each group, FFN channels beyond need given back in all layers alike."""
        counts, spare = self.units(budget), self.removed(budget) - self.leave
        before = None
        while counts != before:
            before = list(counts)
            for index, (group, step) in enumerate(zip(self.groups, self.steps, strict=True)):
                if group.site == "ffn" and counts[index] and spare >= group.cost * step:
                    counts[index] -= step
                    spare -= group.cost * step
        return counts

    def moved(self, budget: Budget, rng: np.random.Generator) -> Budget:
        """A neighbour: up to three groups lose a level more, others less for it."""
        order, more = rng.permutation(len(budget)).tolist(), rng.integers(1, 4)
        raised = list(budget)
        for index in order[:more]:
            raised[index] = min(raised[index] + 1, len(self.counts[index]) - 1)
        return self.trimmed(tuple(raised), order[more:])

    def cheapest(self, prices: Sequence[np.ndarray], bins: int = 10_000) -> Budget:
        """The budget whose prices ``[group][level]`` add up to least.

        A knapsack, over sizes in shares of what is to leave, rounded down. If the size is nearly
        all there is, rounding may leave no budget: then it is one that removes too little.
        """
        need, unit = np.arange(bins + 1), max(self.leave, 1) / bins
        price = np.where(need > 0, np.inf, 0.0)  # of removing so much with the groups seen so far
        sizes = [
            [int(count * group.cost / unit) for count in counts]
            for group, counts in zip(self.groups, self.counts, strict=True)
        ]
        choices = []
        for costs, steps in zip(prices, sizes, strict=True):
            tried = [
                cost + price[np.maximum(need - step, 0)]
                for cost, step in zip(costs, steps, strict=True)
            ]
            choices.append(np.argmin(tried, axis=0))
            price = np.min(tried, axis=0)
        budget, left = [], bins
        for choice, steps in zip(reversed(choices), reversed(sizes), strict=True):
            budget.append(int(choice[left]))
            left = max(left - steps[budget[-1]], 0)
        return tuple(reversed(budget))


def group_costs(
    seen: Mapping[Budget, float], errors: Sequence[np.ndarray], prior: float = 0.2
) -> np.ndarray:
    """What a unit of every group's error costs ``[group]``, from what whole budgets cost.

    Least squares of relative errors, with a constant. Where the budgets seen say little all groups
    cost alike; none is free.

    Parameters
    ----------
    seen : mapping
        Budgets to their costs.
    errors : sequence of numpy.ndarray
        ``[group][level]``.
    prior : float
        How much "alike" weighs, beside the share that one group has in the whole.
    """
    table = np.array([of_budget(errors, budget) for budget in seen])
    costs, n = np.maximum([*seen.values()], 1e-6), len(errors)
    alike = costs.min() / max(table[costs.argmin()].sum(), 1e-12)
    measured = np.column_stack([np.ones(len(table)), table * alike]) / costs[:, None]
    assumed = np.column_stack([np.zeros(n), np.eye(n)]) * prior / n
    sides = np.concatenate([np.ones(len(table)), np.full(n, prior / n)])
    found = np.linalg.lstsq(np.concatenate([measured, assumed]), sides, rcond=None)[0][1:]
    return np.maximum(found, 0.05) * alike


def of_budget(values: Sequence[np.ndarray], budget: Budget) -> np.ndarray:
    """Of values ``[group][level]``, those at a budget's levels ``[group]``."""
    return np.array([levels[level] for levels, level in zip(values, budget, strict=True)])
