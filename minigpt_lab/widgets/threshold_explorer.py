"""The explorer of ε: one front end, as a widget beside a kernel and on a page without one."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import anywidget
import numpy as np
import pandas as pd
import traitlets
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..calibration import Statistics
from ..checks import Array, DictOf, Frame, Instance, Model, Number, OneOf, Text, Tokenizer, checked
from ..figures import activation_histograms, caption_for, png_bytes
from ..models import PruningPlan, Size
from ..planning import EPSILONS, contextual_plan
from ..studies import activation_frame
from .packing import components, pack

_FRONT_END = Path(__file__).parent / "explorer"
_MODULE = "\n".join(
    (_FRONT_END / name).read_text(encoding="utf-8")
    for name in ("counts.js", "picture.js", "page.js")
)
_STYLE = (_FRONT_END / "explorer.css").read_text(encoding="utf-8")
_SWEEP = Frame(("component", "method"), ("epsilon", "perplexity_ratio", "ratio_low", "ratio_high"))


class ThresholdExplorer(anywidget.AnyWidget):
    """ε for activations, linear layers and embedding, over saved statistics of several domains.

    Histogram, layer map and measured losses share one axis of ε; a browser counts every plan from
    arrays that it holds, so the page that a run leaves behind moves too. Python's `plan` and `size`
    are what it shows.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        For the sizes; it is never run.
    statistics : mapping
        Domain to its statistics.
    domain : str
        Where to start.
    epsilon : float
        Activation threshold to start with; thresholds have three digits.
    token_counts : mapping, optional
        Domain to token counts over more text than the statistics saw, see `contextual_plan`.
    sweeps : mapping, optional
        Domain to its `threshold_sweep`: losses to show at ε.
    tokenizer : transformers.PreTrainedTokenizerBase, optional
        To show what excites a neuron, if the statistics were collected with ``examples``.

    Attributes
    ----------
    domain, component, rule : str
        What is shown: a domain; ``"activation"``, ``"linear"``, ``"embedding"`` or ``"all"``
        (linear layers, and the tokens never seen); one ``"epsilon"`` or the lowest ``"share"`` of
        each layer.
    epsilon, share : float
        The threshold, and the share in hundredths.

    Raises
    ------
    ValueError
        If there are no statistics of the domain.
    """

    _esm = _MODULE
    _css = _STYLE
    facts = traitlets.Unicode().tag(sync=True)
    arrays = traitlets.Bytes().tag(sync=True)
    domain = traitlets.Unicode().tag(sync=True)
    component = traitlets.Unicode("activation").tag(sync=True)
    rule = traitlets.Enum(["epsilon", "share"], "epsilon").tag(sync=True)
    epsilon = traitlets.Float(min=0).tag(sync=True)
    share = traitlets.Float(0.1, min=0, max=0.99).tag(sync=True)

    @checked(
        model=Model(lock=False),
        statistics=DictOf(Text(), Instance(Statistics), 1),
        domain=Text(),
        epsilon=Number(low=0),
        token_counts=DictOf(Text(), Array(), 1) | None,
        sweeps=DictOf(Text(), _SWEEP, 1) | None,
        tokenizer=Tokenizer() | None,
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
        tokenizer: PreTrainedTokenizerBase | None = None,
    ):
        OneOf(statistics)("domain", domain)
        self.model, self.statistics = model, statistics
        self.token_counts = token_counts or {}
        facts, arrays = pack(model, statistics, self.token_counts, sweeps or {}, tokenizer)
        super().__init__(
            facts=json.dumps(facts, allow_nan=False), arrays=arrays, domain=domain, epsilon=epsilon
        )

    @traitlets.validate("domain", "component")
    def _known(self, proposal):
        choices = {"domain": self.statistics, "component": components(self.statistics)}
        name = proposal["trait"].name
        return OneOf(choices[name])(name, proposal["value"])

    @traitlets.validate("epsilon")
    def _three_digits(self, proposal):
        return nearest_epsilon(proposal["value"])

    @property
    def plan(self) -> PruningPlan:
        """The plan that is shown."""
        component = self.component
        options: dict[str, Any] = {}
        pruned = ("linear", "activation") if component == "all" else (component,)
        if component == "embedding":
            options = {"epsilon_embedding": self.epsilon}
        elif self.rule == "share":
            options = {"quantile": dict.fromkeys(pruned, round(self.share, 2))}
        else:
            options = {f"epsilon_{name}": self.epsilon for name in pruned}
        if component == "all":
            options["epsilon_embedding"] = 0.0
        counts = self.token_counts.get(self.domain)
        return contextual_plan(
            self.model, self.statistics[self.domain], token_counts=counts, **options
        )

    @property
    def size(self) -> Size:
        """Predicted size of the plan that is shown."""
        return self.plan.predicted_size(self.model)

    def show(self, interactive: bool) -> Page | ThresholdExplorer:
        """What a notebook cell displays: the widget, or the page that moves without a kernel."""
        return self if interactive else Page(self)

    @cached_property
    def still(self) -> bytes:
        """A picture (PNG) for readers that run no scripts."""
        frame = activation_frame({self.domain: self.statistics[self.domain]})
        caption = caption_for(self.model, domain=self.domain)
        mark = {"epsilon": self.epsilon} if self.epsilon else {}
        return png_bytes(activation_histograms(frame, caption=caption, **mark))

    def to_html(self) -> str:
        """A block of HTML with the front end and its arrays: it moves without a kernel."""
        names = ("domain", "component", "rule", "epsilon", "share")
        state = {name: getattr(self, name) for name in names}
        facts = json.loads(self.facts)
        state["domain"] = list(self.statistics).index(self.domain)
        picture = base64.b64encode(self.still).decode("ascii")
        words = html.escape(f"mean |activation| of {facts['model']} on {self.domain}")
        parts = {"facts": _data(facts), "state": _data(state)}
        parts["arrays"] = base64.b64encode(self.arrays).decode("ascii")
        data = "".join(
            f'<script type="text/plain" data-part="{name}">{part}</script>'
            for name, part in parts.items()
        )
        return (
            '<div class="lab-explorer mathjax_ignore tex2jax_ignore">'
            f"<style>{_STYLE}</style>{data}"
            f'<img class="lab-explorer-still" style="max-width:100%" alt="{words}" '
            f'src="data:image/png;base64,{picture}"></div>'
            f'<script type="module">{_MODULE}\nmountAll();</script>'
        )

    def _repr_mimebundle_(self, **options):
        bundle, *metadata = _pair(super()._repr_mimebundle_(**options))
        return (bundle | {"text/html": self.to_html()}, *metadata)


class Page:
    """Displays an explorer as HTML that needs no kernel, with a still picture beside it."""

    def __init__(self, explorer: ThresholdExplorer):
        self.explorer = explorer

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict:
        return {"text/html": self.explorer.to_html()}


def nearest_epsilon(epsilon: float) -> float:
    """The threshold of three digits nearest to a number, within the list's ends."""
    if epsilon <= 0:
        return 0.0
    return float(np.clip(float(f"{epsilon:.2e}"), EPSILONS[1], EPSILONS[-1]))


def _pair(bundle) -> tuple:
    return bundle if isinstance(bundle, tuple) else (bundle or {},)


def _data(content: dict) -> str:
    """JSON that may stand inside a script element."""
    return json.dumps(content).replace("<", "\\u003c")
