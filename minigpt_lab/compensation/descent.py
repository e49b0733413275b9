"""Projected stochastic gradient descent (Adam) over budgets of one size."""

from __future__ import annotations

import numpy as np

from .budgets import Budget, Budgets


class Descent:
    """Adam on the number of parameters to remove from every site, their sum being fixed.

    Removes fewer parameters where they cost more than the mean cost of a parameter, more where they
    cost less. Adam (arXiv 1412.6980) follows that difference; every step is projected back on the
    budgets of one size.

    A loss can only be measured at levels. So each step samples, for every site, the level below or
    above the current number, such that the mean of the samples is that number. If the loss is
    quadratic, the mean of the sampled slopes is exact.

    Parameters
    ----------
    budgets : Budgets
        Levels and target size.
    start : tuple of int
        The budget to start from.
    seed : sequence of int
        Seed of the samples.

    Attributes
    ----------
    removed : numpy.ndarray
        Current parameters to remove from each site ``[site]``, between levels.
    """

    def __init__(self, budgets: Budgets, start: Budget, seed: list[int]):
        self.budgets = budgets
        self.removed = budgets.projected(budgets.removed(start))  # [site]
        self.rng = np.random.default_rng(seed)
        self.m, self.v = np.zeros(len(self.removed)), np.zeros(len(self.removed))  # Adam's moments
        self.steps = 0
        self.windows: list[int] = []  # not yet used in this pass over the windows
        self.uniform = np.zeros(0)  # the last random numbers [site]

    def sample(self, n_windows: int) -> tuple[int, Budget]:
        """Sample the index of a window, and a budget of levels, to measure the slopes at.

        To reduce noise, all windows are used in turn, and every second budget is antithetic: it
        uses 1 - u for the random numbers u of the one before.
        """
        if not self.windows:
            self.windows = self.rng.permutation(n_windows).tolist()
        antithetic = self.steps % 2 == 1
        self.uniform = 1 - self.uniform if antithetic else self.rng.random(len(self.removed))
        return self.windows.pop(), self.budgets.sampled(self.removed, self.uniform)

    def step(self, slopes: np.ndarray, step_size: float) -> None:
        """Take one step of Adam, and project it on the budgets of one size.

        Parameters
        ----------
        slopes : numpy.ndarray
            Rise of the loss per removed parameter ``[site]``.
        step_size : float
            Share of a site's parameters that it moves by, roughly.
        """
        # 1. Gradient with respect to the removed share of every site.
        g = self._excess(slopes) * self.budgets.sizes  # [site]
        # 2. Adam with β₁ = 0.9, β₂ = 0.97: m ← β₁ m + (1 - β₁) g, v ← β₂ v + (1 - β₂) g².
        self.steps += 1
        self.m += 0.1 * (g - self.m)
        self.v += 0.03 * (g**2 - self.v)
        m_hat = self.m / (1 - 0.9**self.steps)
        scale = np.sqrt(self.v / (1 - 0.97**self.steps))  # √v̂
        # Sites whose gradients are tiny beside the others' do not get a whole step.
        move = m_hat / np.maximum(scale, 1e-3 * np.sqrt(np.mean(scale**2)) + 1e-12)
        # 3. Descend and project.
        self.removed = self.budgets.projected(self.removed - step_size * move * self.budgets.sizes)

    def _excess(self, slopes: np.ndarray) -> np.ndarray:
        """Slopes less their mean over the sites that are free to move ``[site]``.

        The mean, weighted by the sites' sizes, is the Lagrange multiplier of the fixed total.
        """
        excess = slopes - np.average(slopes, weights=self.budgets.sizes)
        # A site at a limit is free only if the step leads away from it.
        can_decrease = (self.removed > 0) & (excess > 0)
        can_increase = (self.removed < self.budgets.largest) & (excess < 0)
        free = can_decrease | can_increase
        if not free.any():
            return excess
        return slopes - np.average(slopes[free], weights=self.budgets.sizes[free])
