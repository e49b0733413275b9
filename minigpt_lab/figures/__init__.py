"""Every picture of the series: `style` holds the look, the other files what is drawn."""

from .ablations import (
    calibration_settings,
    layer_budgets,
    layer_losses,
    one_layer_curves,
    variant_dots,
)
from .activations import (
    activation_depth,
    activation_histograms,
    calibration_curve,
    magnitude_scatter,
    overlap_matrix,
)
from .comparison import cosine_curve, influence_bars, method_curves, pareto_front
from .evaluation import (
    answer_differences,
    answer_dots,
    domain_heatmap,
    perplexity_and_accuracy,
    recovery_curves,
)
from .explorer import ThresholdPicture
from .pruning import budget_bars, perplexity_dots, pruning_heatmap, threshold_sweep
from .speed import throughput
from .style import (
    DOMAIN_STYLE,
    METHOD_STYLE,
    PART_STYLE,
    STYLE,
    VARIANT_STYLE,
    caption_for,
    colour,
    png_bytes,
    save_figure,
    style_for,
)

__all__ = [
    "DOMAIN_STYLE",
    "METHOD_STYLE",
    "PART_STYLE",
    "STYLE",
    "VARIANT_STYLE",
    "ThresholdPicture",
    "activation_depth",
    "activation_histograms",
    "answer_differences",
    "answer_dots",
    "budget_bars",
    "calibration_curve",
    "calibration_settings",
    "caption_for",
    "colour",
    "cosine_curve",
    "domain_heatmap",
    "influence_bars",
    "layer_budgets",
    "layer_losses",
    "magnitude_scatter",
    "method_curves",
    "one_layer_curves",
    "overlap_matrix",
    "pareto_front",
    "perplexity_and_accuracy",
    "perplexity_dots",
    "png_bytes",
    "pruning_heatmap",
    "recovery_curves",
    "save_figure",
    "style_for",
    "threshold_sweep",
    "throughput",
    "variant_dots",
]
