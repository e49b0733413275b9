"""Every picture of the series: `style` holds the look, the other files what is drawn."""

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
    "activation_histograms",
    "budget_bars",
    "colour",
    "layer_profile",
    "magnitude_scatter",
    "overlap_matrix",
    "perplexity_dots",
    "png_bytes",
    "save_figure",
    "threshold_sweep",
]
