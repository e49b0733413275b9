"""Pruning that updates the remaining weights: OBS, SlimGPT, the budget search."""

from .budget_search import search_counts
from .given_plan import bias_compensated, weight_compensated
from .layer_by_layer import slimgpt
from .layer_counts import SearchedCounts
from .obs import (
    SALIENCIES,
    Elimination,
    eliminate,
    full_precision,
    quadratic_form,
    reconstruction_loss,
)
from .solver import Problem, Solver, read_problem, solve
from .workspace import discard
