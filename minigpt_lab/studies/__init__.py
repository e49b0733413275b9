"""The questions of the notebooks, as tables: many variants, texts or sizes beside each other."""

from .ablations import (
    PUBLISHED_ALLOCATIONS,
    PUBLISHED_DENSE,
    PUBLISHED_FIRST_LAYER,
    calibration_amounts,
    one_layer_at_a_time,
    slimgpt_timing,
    slimgpt_variants,
)
from .activations import activation_frame, calibration_stability, neuron_overlap
from .analysis import PAPER_EPSILONS, knee, matched_plan, measure, threshold_sweep
from .dropped_blocks import dropped_or_narrowed
from .formats import format_losses
from .held_out import HeldOut
from .matrix import domain_matrix, domain_plans, kept_overlap
from .methods import (
    Method,
    gradient_methods,
    method_comparison,
    method_overlap,
    method_plans,
    method_scores,
    registered_methods,
)
from .projections import layer_losses, layer_problems
from .prunings import SlimGPTRun, fine_tuned_runs, pruned_model, reconstructed_plans, slimgpt_runs
from .rankings import by_seed, told_apart
from .reconstruction import generality_curve, reconstruction_curve
from .runtimes import runtime_speeds
from .smallest import smallest_within
from .tables import cosine_curve, parameter_budget, throughput_rates
