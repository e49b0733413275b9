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
from .running import common_beginning, encode, running_text, token_ids, window_prefix
from .tokens import count_tokens, excerpt, tokenize, unpadded

__all__ = [
    "Domain",
    "Part",
    "Question",
    "check_disjoint",
    "common_beginning",
    "count_tokens",
    "domain_names",
    "encode",
    "excerpt",
    "load_domain",
    "load_domains",
    "make_domain",
    "running_text",
    "token_ids",
    "tokenize",
    "unpadded",
    "window_prefix",
]
