"""Controls for the notebooks: they choose ε and the domain, and show what saved statistics say.

A slider never runs a model. Controls own no analysis: a pure function makes the numbers, a figure
function the picture, and the explorer puts both on the page.
"""

from __future__ import annotations

from collections.abc import Mapping

import ipywidgets
import numpy as np
from IPython.display import Image
from transformers import PreTrainedModel

from .analysis import activation_frame
from .figures import activation_histograms, png_bytes
from .planning import contextual_plan
from .sizes import Size
from .statistics import Statistics


class ThresholdExplorer:
    """ε sliders and a domain picker over saved statistics.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        For the sizes; it is never run.
    statistics : mapping
        Domain to its statistics.
    domain : str
        Where to start.
    epsilon : float
        Activation threshold to start with.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        statistics: Mapping[str, Statistics],
        domain: str,
        epsilon: float,
    ):
        self.model, self.statistics = model, dict(statistics)
        self._frame = activation_frame(self.statistics)
        live = self._frame.loc[self._frame["mean_abs"] > 0, "mean_abs"]
        ends = [*np.quantile(live, [0, 0.999]), *([epsilon] if epsilon > 0 else [])]
        low, high = np.log10(min(ends)) - 0.1, np.log10(max(ends)) + 0.1
        self.domain = ipywidgets.Dropdown(
            options=list(statistics), value=domain, description="domain"
        )
        self.epsilon = ipywidgets.FloatLogSlider(
            value=max(epsilon, 10**low), min=low, max=high, step=0.02, description="ε activation",
            continuous_update=False, readout_format=".2e",
        )  # fmt: skip
        self.summary = ipywidgets.HTML()
        self.summary.add_class("lab-summary")
        self.image = ipywidgets.Image(format="png")
        self.image.layout.align_self = "flex-start"
        self.image.add_class("lab-figure")
        controls = ipywidgets.HBox([self.domain, self.epsilon])
        self.view = ipywidgets.VBox([controls, self.summary, self.image])
        for control in (self.domain, self.epsilon):
            control.observe(lambda _change: self.render(), "value")
        self.render()

    @property
    def size(self) -> Size:
        """Predicted size at the chosen ε and domain."""
        found = self.statistics[self.domain.value]
        plan = contextual_plan(self.model, found, epsilon_activation=self.epsilon.value)
        return plan.predicted_size(self.model)

    def render(self) -> None:
        """Show the numbers and the picture for the controls' values; an error shows in place."""
        try:
            rows = self._frame[self._frame["domain"] == self.domain.value]
            cut = (rows["mean_abs"] <= self.epsilon.value).mean()
            self.summary.value = (
                f"<b>{self.domain.value}</b>, ε = {self.epsilon.value:.3e}: {cut:.1%} of the FFN "
                f"neurons are at or below ε; {self.size}"
            )
            self.image.value = png_bytes(activation_histograms(rows, self.epsilon.value))
        except (ValueError, KeyError) as error:
            self.summary.value = f"<span style='color:#B00020'>{error}</span>"

    def show(self, interactive: bool):
        """What a notebook cell displays: the live controls, or their static picture."""
        return self.view if interactive else Image(self.image.value, format="png")
