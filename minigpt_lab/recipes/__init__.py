"""The whole way from a model and a domain to a mini-GPT, as one function."""

from .mini import make_mini, require_options
from .result import Mini
from .vocabulary import trim_vocabulary
