"""Controls for the notebooks: explorers of ε, ratios and results, and buttons that run a model.

A slider never runs a model: `studies` and `planning` make the numbers, `figures` the picture, and
an explorer puts both on the page. Work that needs a model is a `ModelJob`, behind a button.
"""

from .base import Chooser, Explorer
from .jobs import ModelJob, perplexity_job
from .pruning import ABSOLUTE, RELATIVE, RatioExplorer, ThresholdExplorer
from .recipes import MiniForm

__all__ = [
    "ABSOLUTE",
    "RELATIVE",
    "Chooser",
    "Explorer",
    "MiniForm",
    "ModelJob",
    "RatioExplorer",
    "ThresholdExplorer",
    "perplexity_job",
]
