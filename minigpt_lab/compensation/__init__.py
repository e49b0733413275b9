"""Pruning that updates the remaining weights: OBS, SlimGPT, the budget search."""

from .budget_search import Search
from .given_plan import bias_compensated, weight_compensated
from .layer import Problem, Solver, problem, solve
from .layer_by_layer import slimgpt
from .obs import ERRORS, eliminate, full_precision
from .resumption import discard

__all__ = [
    "ERRORS",
    "Problem",
    "Search",
    "Solver",
    "bias_compensated",
    "discard",
    "eliminate",
    "full_precision",
    "problem",
    "slimgpt",
    "solve",
    "weight_compensated",
]
