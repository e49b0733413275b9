"""Controls for the notebooks: explorers of ε, ratios and results, and buttons that run a model.

A slider never runs a model: `studies` and `planning` make the numbers, `figures` the picture, and
an explorer puts both on the page. That of ε has a front end of its own (``explorer/``), which also
runs without a kernel. Work that needs a model is a `ModelJob`, behind a button.
"""

from .base import Chooser, Explorer
from .jobs import ModelJob, perplexity_job
from .pruning import RatioExplorer
from .recipes import MiniForm
from .threshold_explorer import ThresholdExplorer

__all__ = [
    "Chooser",
    "Explorer",
    "MiniForm",
    "ModelJob",
    "RatioExplorer",
    "ThresholdExplorer",
    "perplexity_job",
]
