"""What the notebooks ask of the modules before: many cuts, texts or sizes beside each other."""

from .analysis import activation_frame
from .lookups import COMPONENTS, Magnitudes, Reading, read_sweep, threshold_range
from .matrix import domain_matrix, domain_plans
from .smallest import smallest_within

__all__ = [
    "COMPONENTS",
    "Magnitudes",
    "Reading",
    "activation_frame",
    "domain_matrix",
    "domain_plans",
    "read_sweep",
    "smallest_within",
    "threshold_range",
]
