"""Evaluation: perplexity, multiple-choice questions, lm-eval tasks, speed and memory."""

from .answers import Answers, answer_questions, compare_answers, position_bias
from .benchmarks import benchmark
from .comparison import compare, corrected, paired_differences, require_one_protocol
from .costs import efficiency, peak_memory, timed
from .generation import generate, sample_texts, write_answers
from .language import Perplexity, perplexity
from .predictions import Divergence, divergence, same_vocabulary
from .presets import PERPLEXITY_PRESETS
from .windows import have_likeliest
