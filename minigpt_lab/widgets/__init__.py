"""Controls for the notebooks: they choose ε, a ratio or a domain, and show what is known there.

A slider never runs a model: `studies.lookups` and `planning` make the numbers, `figures` the
picture, and an explorer puts both on the page. What needs a model is a `ModelJob`, behind a button.
"""

from .base import Chooser, Explorer
from .jobs import Cancelled, ModelJob, perplexity_job
from .pruning import ABSOLUTE, RELATIVE, RatioExplorer, ThresholdExplorer

__all__ = [
    "ABSOLUTE",
    "RELATIVE",
    "Cancelled",
    "Chooser",
    "Explorer",
    "ModelJob",
    "RatioExplorer",
    "ThresholdExplorer",
    "perplexity_job",
]
