"""Unused neurons of several domains, sweeps over thresholds, and controls of equal size."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..calibration import Statistics
from ..checks import DictOf, Frame, Instance, Integer, ListOf, Model, Number, OneOf, Text, checked
from ..criteria import score
from ..domains import Part
from ..evaluation import compare
from ..models import PruningPlan, masked, model_size, weight_axis
from ..planning import contextual_plan
from .arguments import COUNTS, FOLDER, PAIR, PART, STATISTICS, TEXTS
from .held_out import HeldOut, diverging, row_of

#: The thresholds that Mini-GPTs' grid tries (arXiv 2312.12682).
PAPER_EPSILONS = (1e-5, 1e-3, 1e-1)
#: Components that a sweep can prune; "all" is the three together.
SWEEPS = ("linear", "activation", "embedding", "all")
CONTROL = OneOf(("random", "magnitude"))


@checked(model=Model(), plan=Instance(PruningPlan), criterion=CONTROL, seed=Integer(0))
def matched_plan(
    model: PreTrainedModel, plan: PruningPlan, criterion: str, *, seed: int = 0
) -> PruningPlan:
    """Make a control of exactly the same size: as many units and zeroed features, others.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        The model that `plan` is for.
    plan : PruningPlan
        The plan to match: units per layer and site, zeroed features per linear layer.
    criterion : {"random", "magnitude"}
        At random, or the smallest weights.
    seed : int
        For ``"random"``.

    Returns
    -------
    PruningPlan
        With the same vocabulary, which neither control has an opinion on.
    """
    anatomy = plan.require(model)
    options = {"seed": seed} if criterion == "random" else {}
    values = score(model, criterion, sites=tuple(plan.keep), **options).values
    keep = {
        site: [
            np.sort(np.argsort(row, kind="stable")[len(row) - len(units) :]).tolist()
            for row, units in zip(values[site], layers, strict=True)
        ]
        for site, layers in plan.keep.items()
    }
    origin = {"method": criterion, **options, "matched": plan.origin}
    matched = replace(plan, keep=keep, zero={}, shift={}, neurons={}, origin=origin)
    kept = matched.kept_features(anatomy)
    rng = np.random.default_rng(seed)
    for name, sides in plan.zero.items():
        module = model.get_submodule(name)
        matched.zero[name] = {}
        for side in ("input", "output"):
            weight = module.weight.detach().float()
            norms = weight.norm(dim=1 - weight_axis(module, side)).cpu().numpy()
            candidates = np.flatnonzero(kept[name][side])
            strength = rng.random(len(candidates)) if criterion == "random" else norms[candidates]
            chosen = candidates[np.argsort(strength, kind="stable")][: len(sides.get(side, []))]
            matched.zero[name][side] = np.sort(chosen).tolist()
        matched.zero[name]["bias"] = matched.zero[name]["output"][: len(sides.get("bias", []))]
    return matched


@checked(
    **PAIR,
    statistics=STATISTICS,
    text=PART,
    max_tokens=Integer(2) | None,
    seq_len=Integer(2),
    epsilons=DictOf(OneOf(SWEEPS), ListOf(Number(0))),
    controls=ListOf(CONTROL),
    token_counts=COUNTS,
    out_dir=FOLDER,
    seeds=ListOf(Integer(0)),
)
def threshold_sweep(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    statistics: Statistics,
    *,
    text: Part,
    epsilons: Mapping[str, Sequence[float]],
    controls: Sequence[str] = ("random", "magnitude"),
    token_counts: np.ndarray | None = None,
    out_dir: str | os.PathLike | None = None,
    seeds: Sequence[int] = (0,),
    max_tokens: int | None = None,
    seq_len: int = 256,
) -> pd.DataFrame:
    """Size and held-out perplexity at every threshold, beside controls of equal size.

    Parameters
    ----------
    model, tokenizer
        A pair.
    statistics : Statistics
        Of the domain's calibration part.
    text : Part
        Held-out text, e.g. ``domain.test``.
    epsilons : mapping
        Component (of `SWEEPS`) to its thresholds; for ``"embedding"`` they bound a token's
        frequency. ``"all"`` prunes linear layers and activations at ε and the tokens never seen.
    controls : sequence of str
        Which of `matched_plan`'s controls to measure beside.
    token_counts : numpy.ndarray, optional
        See `contextual_plan`.
    out_dir : str or path, optional
        Folder for ``sweep.json``, the finished points: an interrupted sweep continues where it
        stopped, and a longer one measures only what is new.
    seeds : sequence of int
        Of the random control: one row for each, so that its spread shows.
    max_tokens, seq_len : int
        Tokens of the text (all of it by default), and per window (no overlap).

    Returns
    -------
    pandas.DataFrame
        One row per point: ``component, method, epsilon, seed, stored, nonzero, stored_ratio,
        nonzero_ratio, layer_ratio, perplexity, low, high, tokens, bits_per_character,
        perplexity_ratio`` (per character against dense, as a perplexity of the dense tokens),
        ``ratio_low, ratio_high`` (its 95 % interval, from paired differences). All points are
        measured on the same text, shortened by the dense model's tokens.

    Raises
    ------
    ValueError
        If a component is unknown, or there is no threshold at all.
    """
    if not any(epsilons.values()):
        raise ValueError(f"epsilons is {dict(epsilons)}; expected at least one threshold")
    path = out_dir and Path(out_dir) / "sweep.json"
    held_out = HeldOut(model, tokenizer, [text], max_tokens=max_tokens, seq_len=seq_len, path=path)
    subject = copy.deepcopy(model)  # the dense model beside it is the reference

    def measured(plan: PruningPlan) -> dict:
        with masked(subject, plan):
            return held_out.measure(subject)

    plans = list(_plans(model, statistics, epsilons, controls, token_counts, seeds))
    keys = [[plan.keep, plan.zero, plan.vocabulary] for _, plan in plans]
    variants = [(key, partial(measured, plan)) for key, (_, plan) in zip(keys, plans, strict=True)]
    reference, *results = held_out.results(
        [(None, partial(held_out.measure, model)), *variants], "sweep", "point"
    )
    (dense,) = held_out.rows(reference)
    rows = []
    for (facts, plan), result in zip(plans, results, strict=True):
        (row,) = held_out.rows(result)
        size = plan.predicted_size(model).to_frame().iloc[0].to_dict()
        # token counts differ once tokens are removed: compare per character, on the scale of the
        # dense model's tokens
        excess = row["bits_per_character"] / dense["bits_per_character"]
        ratio = dense["perplexity"] ** (excess - 1)
        interval = _ratio_interval(held_out, reference, result, dense)
        rows.append({**facts, **size, **row, "perplexity_ratio": ratio, **interval})
    return pd.DataFrame(rows)


def _ratio_interval(held_out: HeldOut, reference: dict, result: dict, dense: dict) -> dict:
    """95 % interval of `perplexity_ratio`: of the paired difference from the dense model."""
    (first,), (second,) = held_out.perplexities(reference), held_out.perplexities(result)
    found = compare({"dense": first, "pruned": second}, n_permutations=1).iloc[0]
    scale = 1.0
    if found["unit"] == "nats per character":  # characters of a token of the dense model
        scale = np.log(dense["perplexity"]) / (np.log(2) * dense["bits_per_character"])
    return {f"ratio_{end}": float(np.exp(scale * found[end])) for end in ("low", "high")}


def _plans(
    model, statistics, epsilons, controls, token_counts, seeds
) -> Iterator[tuple[dict, PruningPlan]]:
    """Plans of all thresholds and of their controls, with what they are."""
    for component, values in epsilons.items():
        for epsilon in values:
            facts = {"component": component, "method": "contextual", "epsilon": epsilon, "seed": 0}
            thresholds = {f"epsilon_{component}": epsilon}
            if component == "all":
                thresholds = {"epsilon_linear": epsilon, "epsilon_activation": epsilon}
                thresholds["epsilon_embedding"] = 0.0
            plan = contextual_plan(model, statistics, **thresholds, token_counts=token_counts)
            yield facts, plan
            # tokens are removed by frequency alone: nothing to control for
            for control in controls if component != "embedding" else ():
                for seed in seeds if control == "random" else (0,):
                    matched = matched_plan(model, plan, control, seed=seed)
                    yield {**facts, "method": control, "seed": seed}, matched


@checked(curve=Frame(numbers=("nonzero_ratio", "perplexity_ratio")))
def knee(curve: pd.DataFrame) -> pd.Series:
    """The point of a curve of log perplexity over size farthest below the line between its ends.

    Parameters
    ----------
    curve : pandas.DataFrame
        Rows of one component and method of `threshold_sweep`.

    Returns
    -------
    pandas.Series
        The row: as small as possible before perplexity takes off. The largest size if no point
        lies below the line.
    """
    curve = curve.sort_values("nonzero_ratio")
    size, loss = curve["nonzero_ratio"].to_numpy(), np.log(curve["perplexity_ratio"].to_numpy())
    below = np.interp(size, size[[0, -1]], loss[[0, -1]]) - loss
    return curve.iloc[below.argmax() if below.max() > 1e-9 else -1]


@checked(**PAIR, texts=TEXTS, variant=Text(), dense=Model(lock=False) | None)
def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Part],
    *,
    variant: str,
    dense: PreTrainedModel | None = None,
    **protocol,
) -> pd.DataFrame:
    """Size and perplexity of one model on several texts, one row per text.

    Parameters
    ----------
    texts : sequence of Part
        Held-out texts, all of which is used; shorten them once with `excerpt`.
    variant : str
        Its name in the table: dense, masked, shrunk, ….
    dense : transformers.PreTrainedModel, optional
        The dense model, another object, for the ratios and the divergence from it.
    **protocol
        Of `perplexity`.
    """
    size = model_size(model, dense)
    facts = {name: getattr(size, name) for name in ("stored", "nonzero", "layer_ratio")}
    protocol = {"max_characters": None, "progress": False, **protocol}
    found = [diverging(model, dense, tokenizer, text, **protocol) for text in texts]
    return pd.DataFrame([{"variant": variant, **facts, **row_of(each)} for each in found])
