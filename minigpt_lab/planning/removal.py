"""Every plan by thresholds of one domain at once: the smallest threshold that removes each unit.

Raising ε only prunes more, so one number per unit says which of the plans of `contextual_plan` hold
it. Thresholds are those of an ascending list: what a page can count without a model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedModel

from ..calibration import Statistics
from ..checks import Array, Instance, Model, OneOf, checked
from ..models import Anatomy
from .thresholds import token_facts

#: Zero and all numbers of three digits from 1e-12 to 9.99e6: the thresholds that a page offers.
EPSILONS = np.array([0.0, *(float(f"{m}e{e}") for e in range(-14, 5) for m in range(100, 1000))])
#: The lowest shares of each layer that a page offers.
SHARES = np.arange(100) / 100
#: Rules of a threshold: one ε for all layers, or the lowest share of each.
RULES = {"epsilon": EPSILONS, "share": SHARES}

Indices = np.ndarray  # into the thresholds of a rule; their number where none of them suffices


@dataclass(frozen=True)
class Removals:
    """Index of the smallest threshold that removes a unit, and what every threshold zeroes.

    Parameters
    ----------
    activation : list of numpy.ndarray
        FFN channels, pruned by their activation alone ``[layer][channel]``.
    linear : dict
        Site to its units, pruned by inputs and outputs of linear layers ``[layer][unit]``. The
        activation is an input too, so pruning both at one threshold removes the same.
    zeroed : numpy.ndarray
        Weights that ``linear`` zeroes in kept units ``[threshold]``.
    """

    activation: list[Indices]
    linear: dict[str, list[Indices]]
    zeroed: np.ndarray


@checked(
    model=Model(lock=False),
    statistics=Instance(Statistics, "lab.collect_statistics gives it"),
    rule=OneOf(RULES),
)
def removals(model: PreTrainedModel, statistics: Statistics, *, rule: str = "epsilon") -> Removals:
    """Smallest threshold that removes each unit, over all plans of `contextual_plan`.

    A unit without effect is removed, so its threshold is a minimum of maxima: the first of its
    projections of which all features are pruned. The strongest unit of a layer comes back once all
    others are gone: of *n* units at most *n* - 1 are removed.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        For its shapes; it is not run.
    statistics : Statistics
        Of one domain.
    rule : {"epsilon", "share"}
        Thresholds: `EPSILONS`, or `SHARES` of each layer.
    """
    anatomy, first = Anatomy(model), _first_pruned(statistics, rule)
    read = [anatomy.name(i, anatomy.family.consumes["ffn"]) for i in range(len(anatomy.layers))]
    channels = [
        first[name]["input"][anatomy.unit_features(anatomy.family.consumes["ffn"], layer)[:, 0]]
        for layer, name in enumerate(read)
    ]
    linear = {
        site: [_units(anatomy, first, site, layer) for layer in range(len(anatomy.layers))]
        for site in ("ffn", "attention")
    }
    return Removals(channels, linear, _zeroed(anatomy, statistics, first, linear, len(RULES[rule])))


def _first_pruned(statistics: Statistics, rule: str) -> dict[str, dict[str, Indices]]:
    """First threshold that prunes a feature, by linear layer and side; 0 for a missing bias."""
    thresholds, first = RULES[rule], {}
    for name in statistics.layer_of:
        absolute = statistics.mean(name, "output", "absolute")
        sides, magnitude = {}, np.zeros(0)
        for side in ("input", "output"):
            magnitude = statistics.magnitude(name, side)
            if rule == "epsilon":
                sides[side] = np.searchsorted(thresholds, magnitude)  # the first ε ≥ m
                continue
            counts = np.floor(thresholds * len(magnitude) + 1e-9)
            rank = np.argsort(np.argsort(magnitude, kind="stable"), kind="stable")
            sides[side] = np.searchsorted(counts, rank, side="right")  # the first count > rank
        sides["bias"] = np.zeros_like(sides["output"])
        if statistics.biased(name):  # pruned with its output, if mean |y| itself is as small
            reached = thresholds
            if rule == "share":
                reached = np.concatenate([[0], np.sort(magnitude)])[counts.astype(int)]
            sides["bias"] = np.maximum(sides["output"], np.searchsorted(reached, absolute))
        first[name] = sides
    return first


def _units(anatomy: Anatomy, first: dict, site: str, layer: int) -> Indices:
    """First threshold at which each unit of a layer has no effect ``[unit]``."""
    family = anatomy.family
    reader, written = family.consumes[site], []
    for projection in family.produces[site]:
        sides = first[anatomy.name(layer, projection)]
        rows = np.maximum(sides["output"], sides["bias"])
        for block in projection.blocks:
            # a head is silent without its values, a channel without any of what its gate multiplies
            if block == "value" if site == "attention" else anatomy.activation_keeps_zero():
                written.append(rows[anatomy.unit_features(projection, layer, block=block)].max(1))
    read = first[anatomy.name(layer, reader)]["input"][anatomy.unit_features(reader, layer)].max(1)
    return np.minimum.reduce([read, *written])


def _zeroed(
    anatomy: Anatomy, statistics: Statistics, first: dict, units: dict, thresholds: int
) -> np.ndarray:
    """Weights zeroed in kept units ``[threshold]``: those of kept features, less those not pruned.

    Of a linear layer, ``inputs · outputs + biases`` weights are not zero.
    """
    last = thresholds + 1  # beyond all thresholds
    gone = {
        name: {side: np.full(len(f), last) for side, f in s.items()} for name, s in first.items()
    }
    back = {
        name: {side: np.full(len(f), last) for side, f in s.items()} for name, s in first.items()
    }
    for site, layer, projection, side in _coupled(anatomy, units):
        name, features = anatomy.name(layer, projection), anatomy.unit_features(projection, layer)
        own = units[site][layer]
        reader = anatomy.family.consumes[site]
        magnitude = statistics.mean(anatomy.name(layer, reader), "input", "absolute")
        strongest = magnitude[anatomy.unit_features(reader, layer)].mean(1).argmax()
        for each in ("output", "bias") if side == "output" else ("input",):
            gone[name][each][features] = own[:, None]
            back[name][each][features[strongest]] = own.max()
    zeroed = np.zeros(thresholds, np.int64)
    for name, sides in first.items():
        kept, nonzero = {}, {}
        for side, pruned in sides.items():
            there = pruned if side != "bias" or statistics.biased(name) else pruned[:0]
            away, again = gone[name][side][: len(there)], back[name][side][: len(there)]
            full = np.full_like(there, last)
            kept[side] = _alive(full, away, again, thresholds)
            nonzero[side] = _alive(there, away, again, thresholds)
        for sign, n in ((1, kept), (-1, nonzero)):
            zeroed += sign * (n["input"] * n["output"] + n["bias"])
    return zeroed


def _coupled(anatomy: Anatomy, units: dict) -> Iterator[tuple]:
    """Site, layer, projection and side of everything that belongs to units."""
    for site in units:
        for layer in range(len(anatomy.layers)):
            for projection, side in anatomy.coupled(site):
                yield site, layer, projection, side


def _alive(pruned: Indices, away: Indices, again: Indices, thresholds: int) -> np.ndarray:
    """Number of features ``[threshold]`` before they are pruned, while their unit is kept.

    A unit is away from its own threshold on, until it is there again as the layer's strongest.
    """
    ends = [np.minimum(pruned, away), again, np.maximum(pruned, again)]
    change = [np.bincount(end, minlength=thresholds + 2)[:thresholds] for end in ends]
    return len(pruned) + np.cumsum(change[1] - change[0] - change[2])


@checked(
    model=Model(lock=False),
    statistics=Instance(Statistics, "lab.collect_statistics gives it"),
    token_counts=Array() | None,
)
def token_removals(
    model: PreTrainedModel, statistics: Statistics, *, token_counts: np.ndarray | None = None
) -> tuple[Indices, Indices]:
    """First of `EPSILONS` that a token's share lies at or below, and that removes it ``[token]``.

    A token is removed after all that are merged from it, so its share is the largest of theirs.

    Raises
    ------
    ValueError
        If the statistics know no merges: such a vocabulary is not trimmed.
    """
    counts = statistics.token_counts if token_counts is None else np.array(token_counts)
    shares, always, merges = token_facts(model, statistics, None, counts)
    own = np.searchsorted(EPSILONS, shares)
    removal = np.where(always, len(EPSILONS), own)
    left, right, result = merges.T
    before = -1
    while before != (before := int(removal.sum())):  # until nothing changes
        np.maximum.at(removal, left, removal[result])
        np.maximum.at(removal, right, removal[result])
    return own, removal
