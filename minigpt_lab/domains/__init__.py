"""Text, from declared sources, files or the hub to domains and on to batches of tokens."""

from .domain import (
    Domain,
    Part,
    check_disjoint,
    domain_names,
    load_domain,
    load_domains,
    make_domain,
)
from .questions import Question
from .tokens import count_tokens, encoded, excerpt, tokenize, unpadded, window_prefix

__all__ = [
    "Domain",
    "Part",
    "Question",
    "check_disjoint",
    "count_tokens",
    "domain_names",
    "encoded",
    "excerpt",
    "load_domain",
    "load_domains",
    "make_domain",
    "tokenize",
    "unpadded",
    "window_prefix",
]
