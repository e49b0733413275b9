"""Every picture of the series: `style` holds the look, the other files what is drawn."""

from .ablations import (
    calibration_settings,
    layer_budgets,
    layer_losses,
    one_layer_curves,
    reconstruction_curve,
    variant_dots,
)
from .activations import (
    activation_depth,
    activation_histograms,
    calibration_curve,
    magnitude_scatter,
    overlap_matrix,
)
from .comparison import (
    cosine_curve,
    influence_bars,
    method_curves,
    pareto_front,
    size_and_loss,
    throughput,
)
from .evaluation import (
    answer_differences,
    answer_dots,
    domain_heatmap,
    perplexity_and_accuracy,
    recovery_curves,
    restore_or_adapt,
)
from .pruning import budget_bars, perplexity_dots, pruning_heatmap, threshold_sweep
from .style import (
    DOMAIN_STYLE,
    METHOD_STYLE,
    PART_STYLE,
    STYLE,
    VARIANT_STYLE,
    caption_for,
    png_bytes,
    save_figure,
    style_for,
)
from .trade_offs import format_curves, generality_front, limit_curves
