"""Explorer of ratio and method over finished scores."""

from __future__ import annotations

from collections.abc import Mapping

import ipywidgets
from transformers import PreTrainedModel

from ..checks import DictOf, Instance, Model, Number, Text, checked
from ..criteria import Scores
from ..figures import png_bytes, pruning_heatmap
from ..models import PruningPlan
from ..planning import ALLOCATIONS, plan_from_scores
from .base import Explorer, escaped, size_words

_HIGHEST = 0.99  # ratio of a slider: something of each layer must be kept


class RatioExplorer(Explorer):
    """Method, ratio and allocation over finished scores, and the plan they give.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        The one that was scored; it is never run.
    scores : mapping
        Name to show to `Scores`.
    ratio : float
        Share of units to start with, from 0 to 0.99.
    """

    @checked(
        model=Model(lock=False),
        scores=DictOf(Text(), Instance(Scores), 1),
        ratio=Number(low=0, high=_HIGHEST),
    )
    def __init__(self, model: PreTrainedModel, scores: Mapping[str, Scores], *, ratio: float = 0.2):
        self.model, self.scores = model, dict(scores)
        self.method = ipywidgets.Dropdown(options=list(scores), description="method")
        self.allocation = ipywidgets.Dropdown(options=list(ALLOCATIONS), description="allocation")
        self.ratio = ipywidgets.FloatSlider(
            ratio,
            min=0,
            max=_HIGHEST,
            step=0.01,
            readout_format=".0%",
            description="ratio",
            continuous_update=False,
            layout={"width": "440px"},
        )
        inputs = [self.method, self.allocation, self.ratio]
        super().__init__([ipywidgets.HBox(inputs[:2]), self.ratio], inputs)

    @property
    def plan(self) -> PruningPlan:
        """The plan for the controls' values."""
        scores = self.scores[self.method.value]
        ratio, allocation = self.ratio.value, self.allocation.value
        return plan_from_scores(self.model, scores, ratio=ratio, allocation=allocation)

    def choose(self) -> tuple[str, bytes]:
        """Sizes, and the share removed of every layer."""
        plan = self.plan
        words = size_words(plan.predicted_size(self.model))
        return f"<b>{escaped(self.method.value)}</b>: {words}", png_bytes(
            pruning_heatmap(plan.to_frame())
        )
