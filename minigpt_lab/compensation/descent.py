"""Stochastic gradient descent over budgets of one size."""

from __future__ import annotations

import numpy as np

from .budgets import Budget, Budgets


class Descent:
    """Gives parameters back to sites that miss them much, and takes them where they count little.

    Adam (arXiv 1412.6980) on each site's cost per parameter beyond the common price, projected on
    the budgets of one size. Only levels are ever measured: each step samples them so that their
    mean is the current number of parameters. If the cost is quadratic, the mean slope is exact.

    Parameters
    ----------
    budgets : Budgets
        Where to move.
    budget : tuple of int
        Where to begin.
    seed : sequence of int
        Of the samples.
    """

    def __init__(self, budgets: Budgets, budget: Budget, seed: list[int]):
        self.budgets = budgets
        self.removed = budgets.projected(budgets.removed(budget))  # [site]
        self.rng = np.random.default_rng(seed)
        self.mean, self.square = np.zeros(len(self.removed)), np.zeros(len(self.removed))
        self.steps = 0
        self.windows: list[int] = []
        self.uniform = np.zeros(0)

    def sample(self, n_windows: int) -> tuple[int, Budget, Budget]:
        """A window, the levels below the current numbers, and levels to measure slopes at.

        For less noise all windows take their turn, and every second sample mirrors the one before.
        """
        if not self.windows:
            self.windows = self.rng.permutation(n_windows).tolist()
        mirrored = self.steps % 2 == 1
        self.uniform = 1 - self.uniform if mirrored else self.rng.random(len(self.removed))
        below = self.budgets.levels_below(self.removed)
        return self.windows.pop(), below, self.budgets.sampled(self.removed, below, self.uniform)

    def step(self, slopes: np.ndarray, step_size: float) -> None:
        """Move by about so large a share of every site, given the cost per parameter."""
        gradient = self._excess(slopes) * self.budgets.sizes
        self.steps += 1
        # Adam: mean and square of the gradient, corrected for their start at 0
        self.mean += 0.1 * (gradient - self.mean)
        self.square += 0.03 * (gradient**2 - self.square)
        mean = self.mean / (1 - 0.9**self.steps)
        scale = np.sqrt(self.square / (1 - 0.97**self.steps))
        move = mean / np.maximum(scale, 1e-3 * np.sqrt(np.mean(scale**2)) + 1e-12)
        self.removed = self.budgets.projected(self.removed - step_size * move * self.budgets.sizes)

    def _excess(self, slopes: np.ndarray) -> np.ndarray:
        """Cost of a parameter beyond the mean of those sites that can give or take some."""
        excess = slopes - np.average(slopes, weights=self.budgets.sizes)
        # a site at its limit counts if it would move away from it
        can_give = (self.removed > 0) & (excess > 0)
        can_take = (self.removed < self.budgets.largest) & (excess < 0)
        free = can_give | can_take
        if not free.any():
            return excess
        return slopes - np.average(slopes[free], weights=self.budgets.sizes[free])
