"""Every picture of the series: `style` holds the look, the other files what is drawn."""

from .evaluation import (
    answer_differences,
    answer_dots,
    domain_heatmap,
    perplexity_and_accuracy,
    recovery_curves,
)
from .explorer import ThresholdPicture
from .pruning import (
    activation_histograms,
    budget_bars,
    layer_profile,
    magnitude_scatter,
    overlap_matrix,
    perplexity_dots,
    threshold_sweep,
)
from .style import DOMAIN_COLOURS, METHOD_STYLE, PART_COLOURS, STYLE, colour, png_bytes, save_figure

__all__ = [
    "DOMAIN_COLOURS",
    "METHOD_STYLE",
    "PART_COLOURS",
    "STYLE",
    "ThresholdPicture",
    "activation_histograms",
    "answer_differences",
    "answer_dots",
    "budget_bars",
    "colour",
    "domain_heatmap",
    "layer_profile",
    "magnitude_scatter",
    "overlap_matrix",
    "perplexity_and_accuracy",
    "perplexity_dots",
    "png_bytes",
    "recovery_curves",
    "save_figure",
    "threshold_sweep",
]
