"""What a model still knows: perplexity, answers to multiple-choice questions, lm-eval's tasks."""

from .answers import Answers, answer_questions, compare_answers, position_bias
from .benchmarks import benchmark
from .language import Perplexity, generate, perplexity

__all__ = [
    "Answers",
    "Perplexity",
    "answer_questions",
    "benchmark",
    "compare_answers",
    "generate",
    "perplexity",
    "position_bias",
]
