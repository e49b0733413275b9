"""What saved statistics and sweeps say about a threshold, read without running a model.

Sorted arrays make a share below ε a binary search, and a sweep's perplexities are read between its
measured points: a slider can ask as often as it likes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd

from ..calibration import Statistics
from ..checks import DictOf, Frame, Instance, Number, OneOf, Text, check_fields, checked
from .arguments import COUNTS, STATISTICS

#: What a threshold can act on, in the order of the controls.
COMPONENTS = ("linear", "activation", "embedding")


@dataclass(frozen=True)
class Magnitudes:
    """One domain's mean magnitudes, sorted, for each component.

    Parameters
    ----------
    statistics : Statistics
        Of the domain.
    token_counts : numpy.ndarray, optional
        Token counts ``[vocabulary]`` over more text than the statistics saw.
    """

    statistics: Statistics
    token_counts: np.ndarray | None = None

    def __post_init__(self):
        check_fields(self, statistics=STATISTICS, token_counts=COUNTS)

    @cached_property
    def layers(self) -> list[np.ndarray]:
        """Mean |activation| of every layer's FFN neurons, ascending ``[layer][neuron]``."""
        found = self.statistics
        return [np.sort(found.magnitude(name, "activation")) for name in found.activations]

    @cached_property
    def pooled(self) -> dict[str, np.ndarray]:
        """Component to all its magnitudes, ascending: neurons, or tokens' shares of the text."""
        found = self.statistics
        sides = [found.magnitude(name, side) for name, side in found.sums]
        counts = found.token_counts if self.token_counts is None else self.token_counts
        return {
            "linear": np.sort(np.concatenate(sides)),
            "activation": np.sort(np.concatenate(self.layers)),
            "embedding": np.sort(counts / max(counts.sum(), 1)),
        }

    def share(self, component: str, epsilon: float) -> float:
        """Share of a component's neurons (or tokens) at or below ε."""
        values = self.pooled[component]
        return float(np.searchsorted(values, epsilon, side="right") / len(values))

    def layer_thresholds(self, share: float) -> np.ndarray:
        """The ε of each layer that a share of its FFN neurons lies at or below ``[layer]``."""
        return np.array([values[max(int(share * len(values)) - 1, 0)] for values in self.layers])


@checked(
    magnitudes=DictOf(Text(), Instance(Magnitudes), 1),
    component=OneOf(COMPONENTS),
    epsilon=Number(0) | None,
)
def threshold_range(
    magnitudes: Mapping[str, Magnitudes], component: str, epsilon: float | None = None
) -> tuple[float, float]:
    """Where a slider of ε should begin and end, as powers of ten.

    From just below the smallest magnitude above zero to the 99.9 % quantile over all domains, and
    to `epsilon` where that lies outside.
    """
    values = np.concatenate([found.pooled[component] for found in magnitudes.values()])
    live = values[values > 0]
    ends = [*np.quantile(live, [0, 0.999])] if len(live) else [1e-6, 1.0]
    ends += [epsilon] if epsilon else []
    return float(np.log10(min(ends)) - 0.1), float(np.log10(max(ends)) + 0.1)


@dataclass(frozen=True)
class Reading:
    """A loss read from a sweep: at a measured point, or between two."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        between = "" if self.low == self.high else f", between ε = {self.low:g} and {self.high:g}"
        return f"×{self.value:.2f}{between}"


@checked(
    sweep=Frame(("component", "method"), ("epsilon", "perplexity_ratio")) | None,
    component=OneOf((*COMPONENTS, "all")),
    epsilon=Number(0),
)
def read_sweep(sweep: pd.DataFrame | None, component: str, epsilon: float) -> Reading | None:
    """Perplexity ÷ dense of contextual pruning at ε, read from a finished sweep.

    Parameters
    ----------
    sweep : pandas.DataFrame or None
        From `threshold_sweep`.
    component : str
        Cut alone, as in the sweep.
    epsilon : float
        Threshold.

    Returns
    -------
    Reading or None
        Between two measured points, the straight line of log perplexity over log ε; None where the
        sweep says nothing.
    """
    if sweep is None:
        return None
    points = sweep[(sweep["component"] == component) & (sweep["method"] == "contextual")]
    points = points.sort_values("epsilon")
    known, loss = (points[name].to_numpy(float) for name in ("epsilon", "perplexity_ratio"))
    place = int(np.searchsorted(known, epsilon * (1 - 1e-9)))
    if place < len(known) and np.isclose(known[place], epsilon):
        return Reading(loss[place], epsilon, epsilon)
    if place in (0, len(known)) or known[place - 1] == 0:  # 0 has no place on a log axis
        return None
    around = slice(place - 1, place + 1)
    value = np.interp(np.log(epsilon), np.log(known[around]), np.log(loss[around]))
    return Reading(float(np.exp(value)), *map(float, known[around]))
