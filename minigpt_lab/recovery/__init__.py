"""Short fine-tuning after pruning, of all weights or of LoRA adapters."""

from .finetuning import recover
from .presets import RECOVERY_PRESETS
from .training import require_ended
