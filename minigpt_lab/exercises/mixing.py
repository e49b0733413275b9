"""Exercises of notebook 11: a domain's text and general text in one calibration."""

from __future__ import annotations

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
