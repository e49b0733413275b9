"""What a pass over text collects: statistics, second moments, gradients, SPSA, layer by layer."""

from .gradients import collect_gradients
from .hessians import (
    DAMPING_MODES,
    Hessians,
    Indefinite,
    Moments,
    collect_hessians,
    damped_inverse,
    refit,
)
from .layer_runner import LayerRunner, catch_inputs, for_each_layer
from .neuron_statistics import Statistics, collect_statistics, tokens_hash
from .spsa import estimate_gradients, gradient_cosine, scored_weights

__all__ = [
    "DAMPING_MODES",
    "Hessians",
    "Indefinite",
    "LayerRunner",
    "Moments",
    "Statistics",
    "catch_inputs",
    "collect_gradients",
    "collect_hessians",
    "collect_statistics",
    "damped_inverse",
    "estimate_gradients",
    "for_each_layer",
    "gradient_cosine",
    "refit",
    "scored_weights",
    "tokens_hash",
]
