"""One file per way to score units; importing this package fills the registry."""

from . import contextual, magnitude, random  # noqa: F401  (each registers itself)
from .scores import CRITERIA, Scores, criterion, score

__all__ = ["CRITERIA", "Scores", "criterion", "score"]
