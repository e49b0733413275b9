"""A research kit: how small can a language model get for one domain, and what does it lose."""

from .allocation import plan_from_scores
from .assets import SourceUnavailable
from .criteria import (
    CRITERIA,
    MINI_LLM,
    Scores,
    bias_compensated,
    block_influence,
    criterion,
    score,
)
from .domains import (
    Domain,
    Part,
    Question,
    check_disjoint,
    count_tokens,
    domain_names,
    excerpt,
    load_domain,
    load_domains,
    make_domain,
    tokenize,
)
from .efficiency import efficiency
from .evaluation import (
    Answers,
    Perplexity,
    answer_questions,
    benchmark,
    compare_answers,
    generate,
    perplexity,
    position_bias,
)
from .exercises import check
from .families import FAMILIES
from .hessians import Hessians, collect_hessians, weight_compensated
from .models import load_model
from .plan import PruningPlan
from .planning import contextual_plan
from .presets import PERPLEXITY_PRESETS, RECOVERY_PRESETS
from .recovery import recover
from .runtime import label
from .saving import save_model
from .sizes import Size, describe, model_size
from .slimgpt import slimgpt
from .spsa import gradient_cosine
from .statistics import Statistics, collect_statistics
from .studies import domain_matrix, domain_plans, smallest_within
from .surgery import masked, shrink
from .vocabulary import tokenizer_for, trim_tokenizer

__version__ = "0.1.0"

__all__ = [
    "CRITERIA",
    "FAMILIES",
    "MINI_LLM",
    "PERPLEXITY_PRESETS",
    "RECOVERY_PRESETS",
    "Answers",
    "Domain",
    "Hessians",
    "Part",
    "Perplexity",
    "PruningPlan",
    "Question",
    "Scores",
    "Size",
    "SourceUnavailable",
    "Statistics",
    "answer_questions",
    "benchmark",
    "bias_compensated",
    "block_influence",
    "check",
    "check_disjoint",
    "collect_hessians",
    "collect_statistics",
    "compare_answers",
    "contextual_plan",
    "count_tokens",
    "criterion",
    "describe",
    "domain_matrix",
    "domain_names",
    "domain_plans",
    "efficiency",
    "excerpt",
    "generate",
    "gradient_cosine",
    "label",
    "load_domain",
    "load_domains",
    "load_model",
    "make_domain",
    "masked",
    "model_size",
    "perplexity",
    "plan_from_scores",
    "position_bias",
    "recover",
    "save_model",
    "score",
    "shrink",
    "slimgpt",
    "smallest_within",
    "tokenize",
    "tokenizer_for",
    "trim_tokenizer",
    "weight_compensated",
]
