"""Comparison of pruning methods on one model, at the same sizes, on the same text.

A method is a criterion with its options, with or without bias compensation; `slimgpt` joins as
`SlimGPTRun`. A criterion that a user registers takes part unasked.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path

import pandas as pd
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..calibration import Statistics, tokens_hash
from ..checks import (
    DictOf,
    Instance,
    Integer,
    InvalidArgument,
    ListOf,
    Number,
    OneOf,
    Text,
    checked,
    refuse_unused,
)
from ..compensation import bias_compensated
from ..criteria import CRITERIA, Scores, score
from ..domains import Domain, Part
from ..evaluation import Perplexity, peak_memory, timed
from ..models import SITES, fingerprint
from ..planning import plan_from_scores
from ..store import ResultCache, cache_key
from .activations import set_overlap
from .arguments import BATCHES, FOLDER, MODEL, PAIR, PROTOCOL, STATISTICS, TEXTS
from .held_out import HeldOut
from .prunings import (
    KINDS,
    PLANS,
    Cell,
    FineTunedRun,
    Plans,
    Pruning,
    Prunings,
    pruned_model,
    pruning_key,
)


@dataclass(frozen=True)
class Method:
    """One way to choose the units to remove.

    Parameters
    ----------
    criterion : str
        A key of `CRITERIA`.
    options : mapping
        Of the criterion.
    bias_compensation : bool
        Whether the mean of the removed units goes into biases (FLAP, arXiv 2312.11983).
    """

    criterion: str
    options: Mapping[str, object] = field(default_factory=dict)
    bias_compensation: bool = False


_METHODS = DictOf(Text(), Instance(Method), 1)


def registered_methods() -> dict[str, Method]:
    """Every criterion of `CRITERIA` with its defaults, and FLAP with its bias compensation."""
    flap = Method("fluctuation", bias_compensation=True)
    return {name: Method(name) for name in CRITERIA} | {"fluctuation + bias": flap}


@checked(
    model=MODEL,
    batches=BATCHES,
    statistics=STATISTICS | None,
    methods=_METHODS,
    sites=ListOf(Text(), 1),
    out_dir=FOLDER,
)
def method_scores(
    model: PreTrainedModel,
    batches: Sequence[dict],
    *,
    statistics: Statistics,
    methods: Mapping[str, Method],
    sites: tuple[str, ...] = SITES,
    out_dir: str | os.PathLike | None = None,
) -> tuple[dict[str, Scores], pd.DataFrame]:
    """Scores under every method, and what each took: memory beside the weights, and seconds.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A supported causal language model; unchanged afterwards.
    batches : list of dict
        Calibration tokens, for methods that need more than statistics.
    statistics : Statistics
        Of the same tokens: one pass for all methods that can do with it.
    methods : mapping
        Name to `Method`.
    sites : tuple of str
        What to score.
    out_dir : str or path, optional
        Folder in which scores and costs are kept; with both there, nothing is computed.

    Returns
    -------
    dict, pandas.DataFrame
        Name to `Scores`; columns ``method, peak_mib, seconds``.
    """
    results = ResultCache(out_dir and Path(out_dir) / "costs.json")
    how = {"statistics": statistics, "sites": sites}
    facts = [fingerprint(model), tokens_hash(batches), sites]

    def costs(compute: Callable, folder: Path | None) -> dict:
        if folder is not None:
            for path in folder.glob("*.safetensors"):  # scores whose cost was lost
                path.unlink()
        with peak_memory(model.device) as peak:
            seconds, _ = timed(model.device, compute)
        return {"peak_mib": peak() / 2**20, "seconds": seconds}

    scores, rows = {}, []
    for name, method in tqdm(methods.items(), desc="scores", unit="method"):
        key = [*facts, method.criterion, dict(method.options)]
        folder = Path(out_dir) / "scores" / cache_key(key)[:16] if out_dir else None
        options = {**how, "cache": folder or False, **method.options}
        compute = cache(partial(score, model, method.criterion, batches, **options))
        took = results.get(key, partial(costs, compute, folder))
        scores[name] = compute()
        rows.append({"method": name, **took})
    return scores, pd.DataFrame(rows)


@checked(
    model=MODEL,
    scores=DictOf(Text(), Instance(Scores), 1),
    methods=_METHODS,
    statistics=STATISTICS | None,
    ratios=ListOf(Number(0, below=1), 1),
    sites=ListOf(OneOf(KINDS), 1) | None,
)
def method_plans(
    model: PreTrainedModel,
    scores: Mapping[str, Scores],
    *,
    methods: Mapping[str, Method],
    statistics: Statistics,
    ratios: Sequence[float],
    sites: Iterable[str] | None = None,
    **allocation,
) -> Plans:
    """A plan for every method, kind of units and ratio; no pass over any text.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        The one that was scored.
    scores, methods : mapping
        By the same names.
    statistics : Statistics
        For bias compensation.
    ratios : sequence of float
        Shares of the units of every layer.
    sites : iterable of str, optional
        Keys of `KINDS`; by default those that every method has scores of.
    **allocation
        Of `plan_from_scores`; by default uniform, so that all methods store the same.
    """
    plans, scored = {}, set.intersection(*({*each.values} for each in scores.values()))
    for kind in sites or ():
        if missing := sorted({*KINDS[kind]} - scored):
            raise InvalidArgument(
                f"sites has {kind!r}, but some method has no scores of {', '.join(missing)}; score "
                f"them (sites={KINDS[kind]}), or leave {kind!r} out"
            )
    sites = [kind for kind in KINDS if {*KINDS[kind]} <= scored] if sites is None else sites
    for name, kind, ratio in itertools.product(scores, sites, ratios):
        values = {site: scores[name].values[site] for site in KINDS[kind]}
        part = replace(scores[name], values=values)
        plan = plan_from_scores(model, part, ratio=ratio, **allocation)
        if methods[name].bias_compensation:
            plan = bias_compensated(model, plan, statistics)
        plans[name, kind, ratio] = plan
    return plans


@checked(
    **PAIR,
    **PROTOCOL,
    plans=PLANS,
    texts=TEXTS,
    recover_on=Instance(Domain) | None,
    recovery=DictOf(Text()) | None,
    out_dir=FOLDER,
)
def method_comparison(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    plans: Prunings,
    *,
    texts: Sequence[Part],
    max_tokens: int = 2_048,
    seq_len: int = 256,
    recover_on: Domain | None = None,
    recovery: Mapping[str, object] | None = None,
    out_dir: str | os.PathLike | None = None,
) -> tuple[pd.DataFrame, dict[tuple, Perplexity]]:
    """Held-out perplexity of every pruned model on every text, beside the dense model.

    Parameters
    ----------
    model, tokenizer
        The dense pair.
    plans : mapping
        From `method_plans`, `slimgpt_runs`, `reconstructed_plans` and `fine_tuned_runs`.
    texts : sequence of Part
        Held out, e.g. the test parts of the calibration domain and of a general one.
    max_tokens, seq_len : int
        Tokens per text, and per window (no overlap).
    recover_on : Domain, optional
        Fine-tune each pruned model on this domain, all on the same text in the same order, and
        measure that instead. The dense model is measured as it is and fine-tuned: the control.
    recovery : mapping, optional
        Arguments of `recover`: ``method, max_tokens, learning_rate, …``.
    out_dir : str or path, optional
        Folder in which finished cells are kept: an interrupted comparison continues.

    Returns
    -------
    table : pandas.DataFrame
        One row per plan and text: ``method, sites, ratio, recovered, seconds`` (of the pruning and
        what follows it, without the scores), ``stored, removed`` (share of the model), and those of
        `Divergence.row`.
    losses : dict
        ``(method, sites, ratio, text)`` to the `Perplexity`, for `lab.compare`.
    """
    if recover_on is None:
        refuse_unused(method_comparison, "recover_on=None", recovery=recovery)
    path = out_dir and Path(out_dir) / "comparison.json"
    held_out = HeldOut(model, tokenizer, texts, max_tokens=max_tokens, seq_len=seq_len, path=path)

    def measured(pruning: Pruning | None) -> dict:
        seconds, pruned = 0.0, model
        if pruning:
            seconds, pruned = timed(model.device, partial(pruned_model, model, pruning))
        return {**held_out.measure(pruned), "seconds": seconds}

    rows, losses = [], {}
    dense = ("dense", "none", 0.0)
    cells: list[tuple[Cell, Pruning | None]] = [*plans.items()]
    if recover_on is not None:
        cells = [
            (cell, FineTunedRun(pruning, tokenizer, recover_on, recovery or {}))
            for cell, pruning in [(dense, None), *cells]
        ]
    cells = [(dense, None), *cells]
    variants = [([each and pruning_key(each)], partial(measured, each)) for _, each in cells]
    results = held_out.results(variants, "comparison", "cell")
    for ((name, kind, ratio), pruning), result in zip(cells, results, strict=True):
        recovered = recover_on is not None and pruning is not None
        facts = {"method": name, "sites": kind, "ratio": ratio, "recovered": recovered}
        facts["seconds"] = result.get("seconds")  # of older results none are known
        rows += held_out.table_rows(result, **facts)
        for loss in held_out.perplexities(result):
            losses[name, kind, ratio, loss.text] = loss  # the dense model: the fine-tuned one last
    return pd.DataFrame(rows), losses


@checked(plans=PLANS, sites=OneOf(KINDS), ratio=Number(0, below=1))
def method_overlap(plans: Plans, *, sites: str, ratio: float) -> pd.DataFrame:
    """Jaccard overlap of the units that two methods remove, at one ratio.

    Returns
    -------
    pandas.DataFrame
        As `set_overlap` gives it; a method agrees with itself wholly.
    """
    removed = {
        name: [~flags for site in KINDS[sites] for flags in plan.kept_mask(site)]
        for (name, kind, share), plan in plans.items()
        if (kind, share) == (sites, ratio)
    }
    return set_overlap({name: [layers, layers] for name, layers in removed.items()})


@checked(directions=ListOf(Integer(1)), seeds=Integer(1))
def gradient_methods(directions: Sequence[int], *, seeds: int = 3) -> dict[str, Method]:
    """MINI-LLM's score with every kind of gradient, and a random control.

    Parameters
    ----------
    directions : sequence of int
        Of the zeroth-order estimates, per window.
    seeds : int
        Of the estimates and of the random control, named ``"… (seed k)"``.
    """
    methods = {"backprop": Method("sensitivity", {"gradient": "backprop"})}
    for n, seed in itertools.product(directions, range(seeds)):
        options = {"gradient": "zeroth-order", "n_directions": n, "seed": seed}
        methods[f"zeroth-order, {n} (seed {seed})"] = Method("sensitivity", options)
    methods["none"] = Method("sensitivity", {"gradient": "none"})
    controls = {f"random (seed {seed})": Method("random", {"seed": seed}) for seed in range(seeds)}
    return methods | controls
