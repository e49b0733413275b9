"""Exercises of notebooks 11 and 14: general text in a calibration, a size within limits."""

from __future__ import annotations

import math

from .checking import exercise
from .functions import normal
from .verdicts import Answer

# 11_generality


@exercise("function")
def mixed_moment() -> Answer:
    """``(1 - μ) Xᵀ X / n + μ Yᵀ Y / m`` of tokens X ``[n, features]`` and Y ``[m, features]``."""

    def H(X):
        return X.T @ X / len(X)

    def right(X, Y, mu):
        return (1 - mu) * H(X) + mu * H(Y)

    def pooled(X, Y, mu):
        return ((1 - mu) * X.T @ X + mu * Y.T @ Y) / (len(X) + len(Y))

    mistakes = {
        "with μ on the domain; it is the share of general text": (
            lambda X, Y, mu: right(X, Y, 1 - mu)
        ),
        "the sums mixed; divide each by its number of tokens": (
            lambda X, Y, mu: (1 - mu) * X.T @ X + mu * Y.T @ Y
        ),
        "divided by all tokens; divide each sum by its own": pooled,
        "of mixed activations; mix the moments": (
            lambda X, Y, mu: H((1 - mu) * X[: len(Y)] + mu * Y[: len(X)])
        ),
        "with H_domain whole; it has the share 1 - μ": lambda X, Y, mu: H(X) + mu * H(Y),
    }
    X, Y = normal(12, 4), 2 * normal(20, 4, seed=1)
    cases = {"μ = 0.25": (X, Y, 0.25), "μ = 0.8": (Y, X, 0.8)}
    return Answer(right, mistakes, tolerance=1e-4, cases=cases)


@exercise("number")
def token_weight(domain: int, general: int, share: float) -> Answer:
    """Weight of a general token in one sum, beside 1 for a token of the domain."""
    mistakes = {
        "the odds μ / (1 - μ); the texts differ in length": share / (1 - share),
        "with the lengths the wrong way round": share / (1 - share) * general / domain,
        "the inverse; it is a general token that is asked for": (
            (1 - share) / share * general / domain
        ),
        "with μ instead of μ / (1 - μ)": share * domain / general,
    }
    return Answer(share / (1 - share) * domain / general, mistakes)


# 14_smallest_within


@exercise("count")
def sizes_tried(most: float, tolerance: float) -> Answer:
    """Sizes that a bisection measures until the share is known to `tolerance`."""
    halvings = max(0, math.ceil(math.log2(most / tolerance)))
    mistakes = {
        "one for every step of the tolerance; each size halves what is left": (
            math.ceil(most / tolerance)
        ),
        "with the natural logarithm; halving counts powers of 2": math.ceil(
            math.log(most / tolerance)
        ),
        "one too many; the dense model is not pruned": halvings + 1,
        "rounded down; what is left would still exceed the tolerance": math.floor(
            math.log2(most / tolerance)
        ),
    }
    return Answer(halvings, mistakes)


@exercise("function")
def largest_share() -> Answer:
    """Bisection: the largest share that was tried and is within the limits, 0 if none."""

    def bisection(keep, start=0.0):
        def share(within, most, tolerance):
            low, high = start, most
            while high - low > tolerance:
                middle = (low + high) / 2
                low, high = keep(within(middle), low, middle, high)
            return low

        return share

    def right(fits, low, middle, high):
        return (middle, high) if fits else (low, middle)

    def beyond(within, most, tolerance):
        low, high = 0.0, most
        while high - low > tolerance:
            low, high = right(within((low + high) / 2), low, (low + high) / 2, high)
        return high

    mistakes = {
        "the other half; within the limits, more may be pruned": (
            bisection(lambda fits, low, middle, high: right(not fits, low, middle, high))
        ),
        "the smallest share beyond the limits; return one that was measured within": beyond,
        "the share that is kept; return the one that is removed": (
            lambda within, most, tolerance: 1 - bisection(right)(within, most, tolerance)
        ),
        "after one step; go on until the share is known to the tolerance": (
            lambda within, most, tolerance: most / 2 if within(most / 2) else 0.0
        ),
    }

    def at_most(limit):
        return lambda share: share <= limit

    cases = {
        "limits that 37 % meets": (at_most(0.37), 0.8, 0.01),
        "limits that nothing meets": (at_most(-1), 0.8, 0.05),
        "a wide tolerance": (at_most(0.55), 0.9, 0.1),
    }
    return Answer(bisection(right), mistakes, tolerance=1e-6, cases=cases)
