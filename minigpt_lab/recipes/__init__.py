"""The whole way from a model and a domain to a mini-GPT, as one function."""

from .mini import Mini, make_mini
