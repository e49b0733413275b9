"""Text, from declared sources, files or the hub to domains and on to batches of tokens."""

from .cloze import cloze_questions
from .domain import Domain, domain_names, load_domain, load_domains, make_domain
from .parts import Part, check_disjoint
from .passages import split_words
from .questions import Question
from .running import SEPARATOR, RunningText, encode, running_text, token_ids, window_prefix
from .tokens import count_tokens, excerpt, read_windows, tokenize, unpadded
