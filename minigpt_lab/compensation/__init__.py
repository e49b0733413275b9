"""Pruning that updates the remaining weights: OBS, SlimGPT, the budget search."""

from .block_fitting import DenseStream, Reconstruction, fit_block, stream_loss
from .budget_search import is_search, search_counts
from .calibration_windows import STEP_TOKENS, CalibrationWindows
from .dropped_blocks import linear_compensated
from .given_plan import bias_compensated, weight_compensated
from .layer_by_layer import slimgpt
from .layer_counts import SearchedCounts, unscored_sites
from .obs import Elimination, eliminate, full_precision, quadratic_form, reconstruction_loss
from .projection import Problem, apply_elimination, read_problem, solve
from .reconstruction import reconstruct
from .saliencies import SALIENCIES
from .solver import Solver
from .workspace import discard
