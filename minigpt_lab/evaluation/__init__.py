"""Evaluation: perplexity, multiple-choice questions, lm-eval tasks, speed and memory."""

from .answers import Answers, answer_questions, compare_answers, position_bias
from .benchmarks import benchmark
from .costs import efficiency, peak_memory, timed
from .language import Perplexity, generate, perplexity
from .presets import PERPLEXITY_PRESETS
