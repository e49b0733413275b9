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
from .units import attention_site, chosen_sites
