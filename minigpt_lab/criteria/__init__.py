"""One file per way to score units; importing this package fills the registry."""

from . import contextual, fluctuation, magnitude, random, sensitivity, sparsegpt, taylor, wanda
from .fluctuation import bias_compensated
from .influence import block_influence
from .scores import CRITERIA, Scores, criterion, score
from .sensitivity import MINI_LLM
from .units import attention_site, check_option, chosen_sites

__all__ = [
    "CRITERIA",
    "MINI_LLM",
    "Scores",
    "attention_site",
    "bias_compensated",
    "block_influence",
    "check_option",
    "chosen_sites",
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
