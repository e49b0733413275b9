"""One file per way to score units; importing this package fills the registry."""

from . import (
    contextual,
    fluctuation,
    magnitude,
    random_units,
    sensitivity,
    sparsegpt,
    taylor,
    wanda,
)
from .influence import block_influence
from .scores import CRITERIA, Scores, criterion, score
from .sensitivity import MINI_LLM
from .units import attention_site, by_input, check_option, chosen_sites, per_feature

__all__ = [
    "CRITERIA",
    "MINI_LLM",
    "Scores",
    "attention_site",
    "block_influence",
    "by_input",
    "check_option",
    "chosen_sites",
    "contextual",
    "criterion",
    "fluctuation",
    "magnitude",
    "per_feature",
    "random_units",
    "score",
    "sensitivity",
    "sparsegpt",
    "taylor",
    "wanda",
]
