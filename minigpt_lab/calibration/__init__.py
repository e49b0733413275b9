"""What a pass over text collects: statistics, second moments, gradients, SPSA, layer by layer."""

from .gradients import collect_gradients
from .hessians import (
    DAMPINGS,
    Hessians,
    Indefinite,
    Moments,
    collect_hessians,
    damped_inverse,
    refit,
)
from .layer_runner import LayerPass, enter, walk
from .neuron_statistics import Statistics, collect_statistics, tokens_hash
from .spsa import estimate_gradients, gradient_cosine, scored_weights

__all__ = [
    "DAMPINGS",
    "Hessians",
    "Indefinite",
    "LayerPass",
    "Moments",
    "Statistics",
    "collect_gradients",
    "collect_hessians",
    "collect_statistics",
    "damped_inverse",
    "enter",
    "estimate_gradients",
    "gradient_cosine",
    "refit",
    "scored_weights",
    "tokens_hash",
    "walk",
]
