"""Stochastic gradient descent over budgets of one size."""

from __future__ import annotations

import numpy as np

from .budgets import Budget, Budgets


class Descent:
    """Gives parameters back to groups that miss them much, and takes them where they count little.

    Adam (arXiv 1412.6980) on what each group's share costs beyond the common price of a parameter,
    projected on the budgets of one size. Only whole levels are ever measured: each step draws them
    so that on average the shares are met. Where the cost is quadratic, so is on average the slope.

    Parameters
    ----------
    budgets : Budgets
        Where to move.
    budget : tuple of int
        Where to begin.
    seed : sequence of int
        Of the draws.
    """

    def __init__(self, budgets: Budgets, budget: Budget, seed: list[int]):
        self.budgets = budgets
        self.gone = budgets.projected(budgets.gone(budget))
        self.rng = np.random.default_rng(seed)
        self.mean, self.square = np.zeros(len(self.gone)), np.zeros(len(self.gone))
        self.steps = 0
        self.windows: list[int] = []
        self.chances = np.zeros(0)

    def draw(self, windows: int) -> tuple[int, Budget, Budget]:
        """A window's number, the levels below what leaves, and levels to measure slopes at.

        For less noise all windows take their turn, and every second draw mirrors the one before.
        """
        if not self.windows:
            self.windows = self.rng.permutation(windows).tolist()
        mirrored = self.steps % 2 == 1
        self.chances = 1 - self.chances if mirrored else self.rng.random(len(self.gone))
        below = self.budgets.below(self.gone)
        return self.windows.pop(), below, self.budgets.drawn(self.gone, below, self.chances)

    def step(self, slopes: np.ndarray, rate: float) -> None:
        """Move by about so large a share of every group, given the cost per parameter."""
        excess = self._excess(slopes) * self.budgets.whole
        self.steps += 1
        self.mean += 0.1 * (excess - self.mean)
        self.square += 0.03 * (excess**2 - self.square)
        mean = self.mean / (1 - 0.9**self.steps)
        size = np.sqrt(self.square / (1 - 0.97**self.steps))
        move = mean / np.maximum(size, 1e-3 * np.sqrt(np.mean(size**2)) + 1e-12)
        self.gone = self.budgets.projected(self.gone - rate * move * self.budgets.whole)

    def _excess(self, slopes: np.ndarray) -> np.ndarray:
        """What a parameter costs beyond the mean of those groups that can give or take some."""
        excess = slopes - np.average(slopes, weights=self.budgets.whole)
        # a group at its limit counts if it would leave it
        free = (self.gone > 0) & (excess > 0) | (self.gone < self.budgets.most) & (excess < 0)
        if not free.any():
            return excess
        return slopes - np.average(slopes[free], weights=self.budgets.whole[free])
