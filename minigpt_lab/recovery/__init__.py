"""Short fine-tuning after pruning, of all weights or of LoRA adapters."""

from .finetuning import recover

__all__ = ["recover"]
