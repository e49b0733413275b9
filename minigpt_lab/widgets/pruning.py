"""Explorers of plans: ε over saved statistics, ratio and method over finished scores."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import ipywidgets
import numpy as np
import pandas as pd
from transformers import PreTrainedModel

from ..calibration import Statistics
from ..checks import Array, DictOf, Instance, Model, Number, OneOf, Text, checked
from ..criteria import Scores
from ..figures import ThresholdPicture, png_bytes, pruning_heatmap
from ..models import PruningPlan, Size
from ..planning import ALLOCATIONS, contextual_plan, plan_from_scores
from ..studies import COMPONENTS, Magnitudes, read_sweep, threshold_range
from .base import Explorer, Page, escaped, size_words

_HIGHEST = 0.99  # ratio of a slider: something of each layer must be kept
_SLIDER = {"continuous_update": False, "layout": {"width": "440px"}}
ABSOLUTE, RELATIVE = "absolute ε", "share of each layer"


class ThresholdExplorer(Explorer):
    """ε for linear layers, activations and embedding, over saved statistics of several domains.

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
    token_counts : mapping, optional
        Domain to token counts over more text than the statistics saw, see `contextual_plan`.
    sweeps : mapping, optional
        Domain to its `threshold_sweep`: perplexities to read at ε.

    Raises
    ------
    ValueError
        If there are no statistics of the domain.
    """

    @checked(
        model=Model(lock=False),
        statistics=DictOf(Text(), Instance(Statistics), 1),
        domain=Text(),
        epsilon=Number(low=0),
        token_counts=DictOf(Text(), Array(), 1) | None,
        sweeps=DictOf(Text(), Instance(pd.DataFrame), 1) | None,
    )
    def __init__(
        self,
        model: PreTrainedModel,
        statistics: Mapping[str, Statistics],
        domain: str,
        *,
        epsilon: float,
        token_counts: Mapping[str, np.ndarray] | None = None,
        sweeps: Mapping[str, pd.DataFrame] | None = None,
    ):
        OneOf(statistics)("domain", domain)
        self.model, self.statistics = model, statistics
        self.token_counts, self.sweeps = token_counts or {}, sweeps or {}
        self.magnitudes = {
            name: Magnitudes(each, self.token_counts.get(name)) for name, each in statistics.items()
        }
        self._picture = functools.cache(
            lambda name: ThresholdPicture(self.magnitudes, name, sweep=self.sweeps.get(name))
        )
        self.domain = ipywidgets.Dropdown(
            options=list(statistics), value=domain, description="domain"
        )
        self.rule = ipywidgets.ToggleButtons(
            options=[ABSOLUTE, RELATIVE], style={"button_width": "auto"}
        )
        self.active = {
            name: ipywidgets.Checkbox(
                name == "activation", description=name, indent=False, layout={"width": "110px"}
            )
            for name in COMPONENTS
        }
        self.epsilon = {
            name: _log_slider(self.magnitudes, name, epsilon if name == "activation" else None)
            for name in COMPONENTS
        }
        self.share = {name: _share_slider(0.1) for name in COMPONENTS[:2]}
        self.rule.observe(self._swap_sliders, "value")
        self._swap_sliders()
        by_component = (self.active, self.epsilon, self.share)
        rows = [
            ipywidgets.HBox([controls[name] for controls in by_component if name in controls])
            for name in COMPONENTS
        ]
        first = [self.domain, self.rule]
        inputs = [control for controls in by_component for control in controls.values()]
        super().__init__([ipywidgets.HBox(first), *rows], [*first, *inputs])

    @property
    def relative(self) -> bool:
        """Whether the linear and activation sliders are shares of each layer."""
        return self.rule.value == RELATIVE

    def thresholds(self) -> dict[str, float]:
        """ε (or share) of every ticked component; 0 for tokens that never occur."""
        sliders = self.epsilon | (self.share if self.relative else {})
        chosen = {name: sliders[name].value for name in COMPONENTS if self.active[name].value}
        if chosen.get("embedding", 1) <= 10 ** (self.epsilon["embedding"].min + 0.01):
            chosen["embedding"] = 0.0
        return chosen

    @property
    def plan(self) -> PruningPlan:
        """The plan for the controls' values."""
        chosen, domain = self.thresholds(), self.domain.value
        options: dict = {"epsilon_embedding": chosen.pop("embedding", None)}
        options["token_counts"] = self.token_counts.get(domain)
        if self.relative:
            options["quantile"] = chosen or None
        else:
            options |= {f"epsilon_{name}": value for name, value in chosen.items()}
        return contextual_plan(self.model, self.statistics[domain], **options)

    @property
    def size(self) -> Size:
        """Predicted size for the controls' values."""
        return self.plan.predicted_size(self.model)

    def show(self, interactive: bool) -> Page:
        """As every explorer; live, the pictures of all domains are prepared."""
        for name in self.statistics if interactive else ():
            self._picture(name)
        return super().show(interactive)

    def choose(self) -> tuple[str, bytes]:
        """Sizes, shares and readings, and the picture of the thresholds."""
        plan, domain, chosen = self.plan, self.domain.value, self.thresholds()
        size = plan.predicted_size(self.model)
        marks: dict[str, Any] = dict(chosen)
        readings = {}
        if self.relative:  # linear layers have an ε of their own in every place
            marks = {name: chosen[name] for name in chosen.keys() - self.share.keys()}
            if "activation" in chosen:
                marks["activation"] = self.magnitudes[domain].layer_thresholds(chosen["activation"])
        else:
            sweep = self.sweeps.get(domain)
            readings = {name: read_sweep(sweep, name, value) for name, value in chosen.items()}
        lines = [f"<b>{escaped(domain)}</b>: {size_words(size)}", *self._shares(chosen)]
        lines += [
            f"{name} alone: validation perplexity {reading} (from the sweep)"
            for name, reading in readings.items()
            if reading is not None
        ]
        picture = self._picture(domain).draw(
            marks, removed=plan.to_frame(), size=size, readings=readings
        )
        return "<br>".join(lines), picture

    def _shares(self, chosen: Mapping[str, float]) -> list[str]:
        """Shares at or below the thresholds in this domain, and below activation's ε in others."""
        if self.relative:
            shares = [(name, chosen[name]) for name in self.share if name in chosen]
            return [f"{name}: the lowest {share:.0%} of each layer" for name, share in shares]
        own = self.magnitudes[self.domain.value]
        words = [
            f"{name} ε = {value:.3e}: {own.share(name, value):.1%}"
            for name, value in chosen.items()
        ]
        lines = ["at or below " + "; ".join(words)] if words else []
        if "activation" in chosen and len(self.magnitudes) > 1:
            others = [
                f"{escaped(name)} {other.share('activation', chosen['activation']):.1%}"
                for name, other in self.magnitudes.items()
                if other is not own
            ]
            lines.append("the same activation ε elsewhere: " + ", ".join(others))
        return lines

    def _swap_sliders(self, _change=None) -> None:
        for name, slider in self.share.items():
            slider.layout.display = None if self.relative else "none"
            self.epsilon[name].layout.display = "none" if self.relative else None


def _log_slider(magnitudes, component: str, start: float | None) -> ipywidgets.FloatLogSlider:
    low, high = threshold_range(magnitudes, component, start)
    options = {"step": 0.02, "readout_format": ".2e", **_SLIDER}
    return ipywidgets.FloatLogSlider(max(start or 0, 10**low), min=low, max=high, **options)


def _share_slider(start: float, **options) -> ipywidgets.FloatSlider:
    options |= {"step": 0.01, "readout_format": ".0%", **_SLIDER}
    return ipywidgets.FloatSlider(start, min=0, max=_HIGHEST, **options)


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
        self.ratio = _share_slider(ratio, description="ratio")
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
