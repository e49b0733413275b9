"""What the first notebooks ask, as functions: overlap of domains, sweeps over ε, controls."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..calibration import Statistics
from ..checks import DictOf, Frame, Instance, Integer, ListOf, Model, Number, OneOf, Text, checked
from ..criteria import score
from ..domains import Part, excerpt
from ..evaluation import perplexity
from ..models import PruningPlan, fingerprint, masked, model_size, weight_axis
from ..planning import contextual_plan
from ..store import ResultCache, content_hash
from .arguments import COUNTS, FOLDER, PAIR, PART, STATISTICS, TEXTS

#: The thresholds that Mini-GPTs' grid tries (arXiv 2312.12682).
PAPER_EPSILONS = (1e-5, 1e-3, 1e-1)
#: What a sweep can cut; "all" is the three together.
SWEEPS = ("linear", "activation", "embedding", "all")
CONTROL = OneOf(("random", "magnitude"))


@checked(statistics=DictOf(Text(), STATISTICS, 1))
def activation_frame(statistics: Mapping[str, Statistics]) -> pd.DataFrame:
    """FFN activations of several domains in one table: ``domain, layer, neuron, mean_abs``."""
    parts = [
        pd.DataFrame({
            "domain": domain, "layer": layer, "neuron": np.arange(len(magnitude)),
            "mean_abs": magnitude,
        })
        for domain, found in statistics.items()
        for layer, magnitude in enumerate(_activations(found))
    ]  # fmt: skip
    return pd.concat(parts, ignore_index=True)


def _activations(statistics: Statistics) -> list[np.ndarray]:
    return [statistics.mean(name, "input", "absolute") for name in statistics.activations]


@checked(
    samples=DictOf(Text(), ListOf(STATISTICS), 1), epsilon=Number(0) | None,
    quantile=Number(0, below=1) | None,
)  # fmt: skip
def neuron_overlap(
    samples: Mapping[str, Sequence[Statistics]],
    *,
    epsilon: float | None = None,
    quantile: float | None = None,
) -> pd.DataFrame:
    """Overlap of the FFN neurons that two domains leave unused.

    Every domain has two or more samples (statistics of disjoint text of equal length). A pair of
    domains is compared sample against sample; a domain with itself, one sample against another:
    that is the noise floor that contextual differences must stand out from.

    Parameters
    ----------
    samples : mapping
        Domain to its samples.
    epsilon : float, optional
        A neuron is unused if its mean |activation| is at or below this.
    quantile : float, optional
        Or: if it is among this share of the lowest of its layer. Give one of the two.

    Returns
    -------
    pandas.DataFrame
        Columns ``domain, other, jaccard`` (intersection over union, all layers together; NaN if
        nothing is unused), ``chance`` (expected for random sets of the same sizes), ``unused``
        (share of neurons).

    Raises
    ------
    ValueError
        If not exactly one rule is given, or a domain has fewer than two samples.
    """
    if (epsilon is None) == (quantile is None):
        raise ValueError(f"give epsilon or quantile, not both or none: {epsilon}, {quantile}")
    for domain, found in samples.items():
        if len(found) < 2:
            raise ValueError(
                f"{domain!r} has {len(found)} sample(s); two are needed to know the noise"
            )
    unused = {
        domain: [_unused(_activations(sample), epsilon, quantile) for sample in found]
        for domain, found in samples.items()
    }
    return set_overlap(unused).rename(columns={"size": "unused"})


@checked(samples=DictOf(Text(), ListOf(Instance(Sequence))))
def set_overlap(samples: Mapping[str, Sequence[list[np.ndarray]]]) -> pd.DataFrame:
    """Jaccard overlap of sets given as flags ``[member]`` per layer, mean over pairs of samples.

    Returns
    -------
    pandas.DataFrame
        ``domain, other, jaccard, chance, size`` (share of members in the set); a domain with itself
        is one sample against another.
    """
    rows = []
    for domain, own in samples.items():
        for other, foreign in samples.items():
            pairs = [
                _jaccard(a, b)
                for i, a in enumerate(own)
                for j, b in enumerate(foreign)
                if domain != other or i < j
            ]
            jaccard, chance = np.mean(pairs, axis=0)
            share = np.mean([np.concatenate(layers).mean() for layers in own])
            rows.append([domain, other, jaccard, chance, share])
    return pd.DataFrame(rows, columns=["domain", "other", "jaccard", "chance", "size"])


@checked(pieces=DictOf(Text(), ListOf(STATISTICS, 1), 1), quantile=Number(0, below=1))
def calibration_stability(
    pieces: Mapping[str, Sequence[Statistics]], quantile: float
) -> pd.DataFrame:
    """How soon the set of kept FFN neurons settles as the calibration text grows.

    Statistics add up, so one pass over disjoint pieces of a text gives those of all its beginnings.
    Each beginning's set is compared with that of the whole text, which contains it: the last is
    equal by construction, and the others are flattered a little.

    Parameters
    ----------
    pieces : mapping
        Domain to statistics of consecutive, disjoint pieces of its text.
    quantile : float
        A neuron is kept if it is not among this share of the lowest of its layer.

    Returns
    -------
    pandas.DataFrame
        Columns ``domain, tokens, jaccard, chance``, one row per beginning.
    """
    rows = []
    for domain, found in pieces.items():
        kept = [
            [~layer for layer in _unused(_activations(beginning), None, quantile)]
            for beginning in accumulate(found)
        ]
        tokens = accumulate(piece.n_tokens for piece in found)
        rows += [
            [domain, n, *_jaccard(layers, kept[-1])] for n, layers in zip(tokens, kept, strict=True)
        ]
    return pd.DataFrame(rows, columns=["domain", "tokens", "jaccard", "chance"])


def _unused(layers: list[np.ndarray], epsilon, quantile) -> list[np.ndarray]:
    if epsilon is not None:
        return [layer <= epsilon for layer in layers]
    return [layer <= np.quantile(layer, quantile, method="lower") for layer in layers]


def _jaccard(first: list[np.ndarray], second: list[np.ndarray]) -> tuple[float, float]:
    """Observed and expected intersection over union of two sets of neurons."""
    both = sum(int((a & b).sum()) for a, b in zip(first, second, strict=True))
    expected = sum(a.sum() * b.sum() / len(a) for a, b in zip(first, second, strict=True))
    total = sum(int(layer.sum()) for layer in (*first, *second))
    if total == 0:
        return np.nan, np.nan
    return both / (total - both), expected / (total - expected)


@checked(model=Model(), plan=Instance(PruningPlan), criterion=CONTROL, seed=Integer(0))
def matched_plan(
    model: PreTrainedModel, plan: PruningPlan, criterion: str, *, seed: int = 0
) -> PruningPlan:
    """A control of exactly the same size: as many units and zeroed features, chosen otherwise.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        The model that `plan` is for.
    plan : PruningPlan
        What to match: units per layer and site, zeroed features per linear layer.
    criterion : {"random", "magnitude"}
        Choose at random, or those with the smallest weights.
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
    matched = PruningPlan(
        plan.model_hash, plan.units, keep, {}, plan.vocabulary_size, plan.vocabulary,
        {"method": criterion, **options, "matched": plan.origin},
    )  # fmt: skip
    stay = matched.kept_features(anatomy)
    rng = np.random.default_rng(seed)
    for name, sides in plan.zero.items():
        module = model.get_submodule(name)
        matched.zero[name] = {}
        for side in ("input", "output"):
            weight = module.weight.detach().float()
            norms = weight.norm(dim=1 - weight_axis(module, side)).cpu().numpy()
            candidates = np.flatnonzero(stay.get((name, side), np.ones(len(norms), bool)))
            strength = rng.random(len(candidates)) if criterion == "random" else norms[candidates]
            chosen = candidates[np.argsort(strength, kind="stable")][: len(sides.get(side, []))]
            matched.zero[name][side] = np.sort(chosen).tolist()
        matched.zero[name]["bias"] = matched.zero[name]["output"][: len(sides.get("bias", []))]
    return matched


@checked(
    **PAIR, statistics=STATISTICS, texts=PART,
    epsilons=DictOf(OneOf(SWEEPS), ListOf(Number(0))), controls=ListOf(CONTROL),
    token_counts=COUNTS, out_dir=FOLDER, seeds=ListOf(Integer(0)),
)  # fmt: skip
def threshold_sweep(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    statistics: Statistics,
    *,
    texts: Part,
    epsilons: Mapping[str, Sequence[float]],
    controls: Sequence[str] = ("random", "magnitude"),
    token_counts: np.ndarray | None = None,
    out_dir: str | os.PathLike | None = None,
    seeds: Sequence[int] = (0,),
    **protocol,
) -> pd.DataFrame:
    """Size and held-out perplexity at every threshold, beside controls of equal size.

    Parameters
    ----------
    model, tokenizer
        A pair.
    statistics : Statistics
        Of the domain's calibration part.
    texts : Part
        Held-out text, e.g. ``domain.test``.
    epsilons : mapping
        Component (of `SWEEPS`) to its thresholds; for ``"embedding"`` they bound a token's
        frequency. ``"all"`` cuts linear layers and activations at ε and the tokens never seen.
    controls : sequence of str
        Which of `matched_plan`'s controls to measure beside.
    token_counts : numpy.ndarray, optional
        See `contextual_plan`.
    out_dir : str or path, optional
        Folder for ``sweep.jsonl``, the finished points: an interrupted sweep continues where it
        stopped, and a longer one measures only what is new.
    seeds : sequence of int
        Of the random control: one row for each, so that its spread shows.
    **protocol
        Of `perplexity`: ``seq_len, max_tokens, …``.

    Returns
    -------
    pandas.DataFrame
        One row per point: ``component, method, epsilon, seed, stored, nonzero, stored_ratio,
        nonzero_ratio, layer_ratio, perplexity, low, high, tokens, bits_per_character,
        perplexity_ratio`` (per character against dense, as a perplexity of the dense tokens). All
        points are measured on the same text, cut with the dense model's tokens.

    Raises
    ------
    ValueError
        If a component is unknown, or there is no threshold at all.
    """
    if not any(epsilons.values()):
        lists = f"all {len(epsilons)} lists are empty ({', '.join(epsilons)})"
        raise ValueError(f"{lists}; give at least one threshold")
    texts = excerpt(texts, tokenizer, max_tokens=protocol.pop("max_tokens", None))
    protocol["max_characters"] = None
    ledger = ResultCache(out_dir and Path(out_dir) / "sweep.jsonl")
    dense = _point(model, tokenizer, None, texts, protocol, ledger)
    jobs = list(_jobs(model, statistics, epsilons, controls, token_counts, seeds))
    rows = []
    for component, method, epsilon, seed, plan in tqdm(jobs, desc="sweep", unit="point"):
        found = _point(model, tokenizer, plan, texts, protocol, ledger)
        size = plan.predicted_size(model).to_frame().iloc[0].to_dict()
        # token counts differ once tokens leave: compare per character, on the scale of the dense
        # model's tokens
        excess = found["bits_per_character"] / dense["bits_per_character"]
        ratio = dense["perplexity"] ** (excess - 1)
        rows.append(
            {
                "component": component, "method": method, "epsilon": epsilon, "seed": seed,
                **size, **found, "perplexity_ratio": ratio,
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def _jobs(model, statistics, epsilons, controls, token_counts, seeds) -> Iterator[tuple]:
    for component, values in epsilons.items():
        for epsilon in values:
            if component == "all":
                thresholds = {"epsilon_linear": epsilon, "epsilon_activation": epsilon}
                thresholds["epsilon_embedding"] = 0.0
            else:
                thresholds = {f"epsilon_{component}": epsilon}
            plan = contextual_plan(model, statistics, **thresholds, token_counts=token_counts)
            yield component, "contextual", epsilon, 0, plan
            # tokens are cut by frequency alone: nothing to control for
            for control in controls if component != "embedding" else ():
                for seed in seeds if control == "random" else (0,):
                    matched = matched_plan(model, plan, control, seed=seed)
                    yield component, control, epsilon, seed, matched


def _point(model, tokenizer, plan, texts, protocol, ledger: ResultCache) -> dict:
    """Perplexity of one plan, from the finished points if it is there."""
    cuts = None if plan is None else [plan.keep, plan.zero, plan.vocabulary]

    def measured() -> dict:
        with contextlib.nullcontext() if plan is None else masked(model, plan):
            return perplexity(model, tokenizer, texts, **{"progress": False, **protocol}).row()

    return ledger.get([fingerprint(model), cuts, content_hash(texts), protocol], measured)


@checked(curve=Frame(), x=Text(), y=Text())
def knee(curve: pd.DataFrame, x: str = "nonzero_ratio", y: str = "perplexity_ratio") -> pd.Series:
    """The point of a curve farthest below the line between its ends (log of `y` over `x`).

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
    curve = Frame(numbers=(x, y))("curve", curve).sort_values(x).reset_index(drop=True)
    size, loss = curve[x].to_numpy(), np.log(curve[y].to_numpy())
    if len(curve) < 3 or np.ptp(size) == 0 or np.ptp(loss) == 0:
        return curve.iloc[-1]
    size, loss = (size - size[0]) / np.ptp(size), (loss - loss.min()) / np.ptp(loss)
    below = loss[0] + (loss[-1] - loss[0]) * size - loss
    return curve.loc[int(np.argmax(below))] if below.max() > 0 else curve.iloc[-1]


@checked(
    **PAIR, texts=TEXTS, variant=Text(),
    dense=Model(lock=False) | None,
)  # fmt: skip
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
        Held-out texts, all of which is used; cut them once with `excerpt`.
    variant : str
        Its name in the table: dense, masked, shrunk, ….
    dense : transformers.PreTrainedModel, optional
        What it was cut from, for the ratios.
    **protocol
        Of `perplexity`.
    """
    size = model_size(model, dense)
    rows = [
        {
            "variant": variant, "stored": size.stored, "nonzero": size.nonzero,
            "layer_ratio": size.layer_ratio,
            **perplexity(
                model, tokenizer, text, **{"max_characters": None, "progress": False, **protocol}
            ).row(),
        }
        for text in texts
    ]  # fmt: skip
    return pd.DataFrame(rows)
