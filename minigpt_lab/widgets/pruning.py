"""Explorer of ratio and method over finished scores."""

from __future__ import annotations

from collections.abc import Mapping

import ipywidgets
from transformers import PreTrainedModel

from ..checks import DictOf, Instance, Model, Number, Text, checked
from ..criteria import Scores
from ..figures import png_bytes, pruning_heatmap
from ..models import PruningPlan
from ..planning import ALLOCATIONS, BY_DEPTH, plan_from_scores
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
        self.allocation = ipywidgets.Dropdown(  # another rule than "uniform": each method its plan
            options=list(ALLOCATIONS), value="global", description="allocation"
        )
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

    def render(self) -> None:
        """Say that a plan is computed, then show its sizes and its picture."""
        self.shown.value = (
            '<div style="position: relative"><b style="position: absolute; inset: 0; '
            'display: grid; place-items: center; font-size: 1.5em">computing…</b>'
            f'<div style="opacity: 0.25">{self.to_html()}</div></div>'
        )
        super().render()

    def choose(self) -> tuple[str, bytes]:
        """Sizes, and the share removed of every layer."""
        plan = self.plan
        words = size_words(plan.predicted_size(self.model)) + self._rounded_away(plan)
        picture = png_bytes(pruning_heatmap(plan.to_frame()))
        return f"<b>{escaped(self.method.value)}</b>: {words}", picture

    def _rounded_away(self, plan: PruningPlan) -> str:
        """A sentence on the sites of which the rounding to whole units removes none."""
        if self.allocation.value not in BY_DEPTH or not self.ratio.value:
            return ""  # a ranking may keep all units of a site that scores high
        return "".join(
            f"<br>{site}: nothing is removed, as {self.ratio.value:.0%} of {max(plan.units[site])} "
            "units per layer rounds to 0"
            for site in self.scores[self.method.value].values
            if not any(plan.removed[site])
        )
