"""One file per way to score units; importing this package fills the registry."""

from . import contextual, fluctuation, magnitude, random, sensitivity, sparsegpt, taylor, wanda
from .fluctuation import bias_compensated
from .influence import block_influence
from .scores import CRITERIA, Scores, criterion, score
from .sensitivity import MINI_LLM

__all__ = [
    "CRITERIA",
    "MINI_LLM",
    "Scores",
    "bias_compensated",
    "block_influence",
    "contextual",
    "criterion",
    "fluctuation",
    "magnitude",
    "random",
    "score",
    "sensitivity",
    "sparsegpt",
    "taylor",
    "wanda",
]
