"""One file per way to score units; importing this package fills the registry."""

from . import contextual, magnitude, random
from .scores import CRITERIA, Scores, criterion, score

__all__ = ["CRITERIA", "Scores", "contextual", "criterion", "magnitude", "random", "score"]
