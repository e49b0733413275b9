"""Is pruning contextual? Every domain's pruned model, measured on every domain, at one stored size.

If a model pruned for a domain keeps what that domain needs, then on the domain's held-out text it
beats the models pruned for other domains: the diagonal of the table wins its columns. Controls of
the same size know no domain (random units, smallest weights) or all of them (mix).
"""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..calibration import collect_statistics
from ..checks import (
    DictOf,
    Instance,
    Integer,
    ListOf,
    Location,
    Model,
    Number,
    OneOf,
    Tokenizer,
    checked,
)
from ..criteria import score
from ..domains import Domain, Part, excerpt, tokenize
from ..evaluation import perplexity
from ..models import PruningPlan, fingerprint, model_size, shrink
from ..planning import plan_from_scores
from ..recovery import recover
from ..store import ResultCache, content_hash
from .activations import set_overlap

#: Plans that no domain has chosen: all domains together, random units, smallest weights.
CONTROLS = ("mix", "random", "magnitude")
Plans = Mapping[tuple[str, int], PruningPlan]


@checked(
    model=Model(),
    tokenizer=Tokenizer(),
    domains=ListOf(Instance(Domain)),
    ratio=Number(0, below=1),
    samples=Integer(1),
    calibration_tokens=Integer(1),
    seq_len=Integer(2),
    out_dir=Location() | None,
)
def domain_plans(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    domains: Sequence[Domain],
    *,
    ratio: float = 0.3,
    samples: int = 3,
    calibration_tokens: int = 8_192,
    seq_len: int = 256,
    sites: tuple[str, ...] = ("ffn",),
    out_dir: str | os.PathLike | None = None,
) -> dict[tuple[str, int], PruningPlan]:
    """Contextual plans of every domain and the controls' plans, all of one size.

    Parameters
    ----------
    model, tokenizer
        A pair.
    domains : sequence of Domain
        At least two.
    ratio : float
        Share of units to remove in every layer: the same number everywhere, so that every plan
        stores the same number of parameters.
    samples : int
        Disjoint, contiguous pieces of each calibration part, a plan from each: what differs
        between them is noise. The random control changes its seed from sample to sample.
    calibration_tokens, seq_len : int
        Tokens per sample, and per window.
    sites : tuple of str
        Sites to prune: ``"ffn"``, ``"attention"``.
    out_dir : str or path, optional
        Folder in which the statistics are kept, so that a second call needs no pass.

    Returns
    -------
    dict
        ``(cut, sample)`` to plan; a cut is a domain's name or one of `CONTROLS`. The mix has the
        tokens of all domains; the smallest weights are the same in every sample: there is one.

    Raises
    ------
    ValueError
        If there are fewer than two domains, two of one name, or a calibration part is too short.
    """
    names = [domain.name for domain in domains]
    if len(set(names)) < 2 or len(set(names)) < len(names) or set(names) & set(CONTROLS):
        raise ValueError(
            f"domains are {names}; expected two or more, of different names, none of {CONTROLS}"
        )
    # 1. Statistics of every sample of every domain; together they are those of the mix.
    scored: dict[tuple[str, int], tuple[str, dict]] = {}
    for domain in domains:
        pieces = _samples(domain, tokenizer, samples, calibration_tokens, seq_len)
        for sample, batches in enumerate(pieces):
            path = out_dir and Path(out_dir) / f"statistics-{domain.name}-{sample}.safetensors"
            statistics = collect_statistics(model, batches, path=path)
            scored[domain.name, sample] = "contextual", {"statistics": statistics}
    for sample in range(samples):
        first, *others = (scored[name, sample][1]["statistics"] for name in names)
        scored["mix", sample] = "contextual", {"statistics": sum(others, first)}
        scored["random", sample] = "random", {"seed": sample}
    scored["magnitude", 0] = "magnitude", {}

    # 2. A plan of the same size from each.
    plans = {}
    for key, (criterion, options) in scored.items():
        scores = score(model, criterion, sites=sites, **options)
        plans[key] = plan_from_scores(model, scores, ratio=ratio)
    return plans


def _samples(
    domain: Domain, tokenizer: PreTrainedTokenizerBase, n: int, max_tokens: int, seq_len: int
) -> list[list[dict]]:
    """Disjoint, contiguous pieces of a calibration part, of so many tokens each."""
    batches = tokenize(domain.calibration, tokenizer, seq_len=seq_len, max_tokens=n * max_tokens)
    available = sum(batch["input_ids"].numel() for batch in batches)
    if available < n * (max_tokens // seq_len) * seq_len:
        raise ValueError(
            f"{domain.calibration} has {available} tokens, {n} samples of {max_tokens} need more; "
            "take fewer samples or calibration_tokens"
        )
    return batches.samples(n)


@checked(plans=DictOf(Instance(tuple), Instance(PruningPlan)))
def kept_overlap(plans: Plans) -> pd.DataFrame:
    """Jaccard overlap of the units that two plans keep; a cut with itself: between its samples.

    Returns
    -------
    pandas.DataFrame
        As `set_overlap` gives it; cuts with a single sample are left out.
    """
    kept: dict[str, list] = {}
    for (cut, _), plan in plans.items():
        kept.setdefault(cut, []).append(_flags(plan))
    return set_overlap({cut: flags for cut, flags in kept.items() if len(flags) > 1})


def _flags(plan: PruningPlan) -> list[np.ndarray]:
    """Per pruned site and layer, whether each unit is kept."""
    return [
        flags for site in plan.keep if any(plan.removed[site]) for flags in plan.kept_mask(site)
    ]


@checked(
    model=Model(),
    tokenizer=Tokenizer(),
    domains=ListOf(Instance(Domain), 1),
    plans=Instance(Mapping, "lab.domain_plans gives it"),
    max_tokens=Integer(2),
    seq_len=Integer(2),
    recovery_tokens=Integer(0),
    recovery_samples=Integer(0),
    recover_on=OneOf(["mix", "own"]),
    n_bootstrap=Integer(1),
    seed=Integer(0),
    out_dir=Location() | None,
)
def domain_matrix(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    domains: Sequence[Domain],
    *,
    plans: Plans,
    max_tokens: int = 2_048,
    seq_len: int = 256,
    recovery_tokens: int = 0,
    recovery_samples: int = 1,
    recover_on: str = "mix",
    n_bootstrap: int = 1000,
    seed: int = 0,
    out_dir: str | os.PathLike | None = None,
    **recovery,
) -> pd.DataFrame:
    """Held-out perplexity of every pruned model on every domain, compared with the diagonal.

    Parameters
    ----------
    model, tokenizer
        The dense pair.
    domains : sequence of Domain
        Measured on their ``test`` parts.
    plans : mapping
        From `domain_plans`.
    max_tokens, seq_len : int
        Tokens of test text per domain, and per window (no overlap).
    recovery_tokens : int
        If positive, pruned models (and the dense one, as a control) are also fine-tuned on so many
        tokens.
    recovery_samples : int
        Number of samples to fine-tune; the others are measured without recovery only.
    recover_on : {"mix", "own"}
        ``"mix"``: all on the same text, every domain's train part in equal shares, so that only the
        plan can make the difference. ``"own"``: a domain's model on that domain, as Mini-GPTs does;
        then the diagonal has been trained on its column, and wins for that reason too.
    n_bootstrap, seed : int
        Of the intervals; the seed also orders the training.
    out_dir : str or path, optional
        Folder in which finished cells are kept: an interrupted matrix continues.
    **recovery
        Further arguments of `recover`: ``method, learning_rate, …``.

    Returns
    -------
    pandas.DataFrame
        One row per ``recovered, cut, text``; ``perplexity`` (geometric mean over draws),
        ``lowest, highest`` (over draws), ``draws, stored, tokens, bits_per_character``, and
        ``difference, difference_low, difference_high``: log perplexity minus that of the text's own
        cut, nats per token, positive where the own cut is better; 95 % bootstrap over passages
        (paired) and draws. ``attrs["verdict"]`` says in words how often the diagonal wins,
        ``attrs["wins"]`` in numbers.

    Raises
    ------
    ValueError
        If a domain has no plan, or an argument is out of range.
    """
    names = [domain.name for domain in domains]
    missing = [name for name in names if (name, 0) not in plans]
    if missing:
        raise ValueError(f"no plan for {missing}; plans are of {sorted({cut for cut, _ in plans})}")
    texts = {
        domain.name: excerpt(domain.test, tokenizer, max_tokens=max_tokens) for domain in domains
    }
    own = {domain.name: domain for domain in domains}
    mix = mixed(domains) if recovery_tokens else None
    budget = {"max_tokens": recovery_tokens, "seq_len": seq_len, "seed": seed, **recovery}
    measured = _Measurements(
        model, tokenizer, texts, seq_len, ResultCache(out_dir and f"{out_dir}/cells.jsonl")
    )
    rows = []
    for (cut, sample), plan in tqdm({("dense", 0): None, **plans}.items(), "matrix", unit="model"):
        facts = {"cut": cut, "draw": sample}
        rows += measured.rows(plan, recovered=False, **facts)
        if recovery_tokens and sample < recovery_samples:
            train = own.get(cut, mix) if recover_on == "own" else mix
            rows += measured.rows(plan, train, budget, recovered=True, **facts)
    return _compared(pd.DataFrame(rows), n_bootstrap, seed)


class _Measurements:
    """Losses of pruned models on the passages of all texts; finished ones are kept."""

    def __init__(self, model, tokenizer, texts: dict[str, Part], seq_len: int, cache: ResultCache):
        self.model, self.tokenizer, self.texts = model, tokenizer, texts
        self.seq_len, self.cache = seq_len, cache

    def rows(
        self,
        plan: PruningPlan | None,
        train: Domain | None = None,
        budget: dict | None = None,
        **facts,
    ) -> list[dict]:
        """Rows of one model, one per text, recovered on a domain if one is given."""
        key = [fingerprint(self.model), plan and plan.keep, self.seq_len, budget if train else None]
        key += [content_hash([*train.train, *train.validation])] if train else []
        pruned = functools.cache(lambda: self._pruned(plan, train, budget))  # if it is needed
        rows = []
        for name, text in self.texts.items():
            cell = self.cache.get(
                [*key, content_hash(text)], lambda text=text: self._measured(pruned(), text)
            )
            passages = np.array(cell["passages"])  # [passage, 3]
            rows.append({**facts, "text": name, **cell, "passages": passages})
        return rows

    def _measured(self, model: PreTrainedModel, text: Part) -> dict:
        options = {"seq_len": self.seq_len, "max_characters": None, "n_bootstrap": 1}
        found = perplexity(model, self.tokenizer, text, progress=False, **options)
        return {"stored": model_size(model).stored, "passages": found.passages.tolist()}

    def _pruned(
        self, plan: PruningPlan | None, train: Domain | None, budget: dict | None
    ) -> PreTrainedModel:
        pruned = shrink(self.model, plan) if plan else copy.deepcopy(self.model)
        if train is not None:
            budget = {"eval_every": max(1, budget["max_tokens"] // 2), **budget}
            recover(pruned, self.tokenizer, train, **budget)
        return pruned


@checked(domains=ListOf(Instance(Domain), 1))
def mixed(domains: Sequence[Domain]) -> Domain:
    """The domains' train and validation parts taken in turn, in equal shares of bytes."""
    parts: dict[str, Any] = {}
    for part in ("calibration", "train", "validation", "test"):
        queues = {domain.name: iter(domain.parts[part]) for domain in domains}
        used, passages = dict.fromkeys(queues, 0), []
        while True:  # until the first domain runs out: equal shares
            name = min(used, key=used.__getitem__)
            passage = next(queues[name], None)
            if passage is None:
                break
            used[name] += len(passage.encode())
            passages.append(passage)
        parts[part] = Part("mix", part, tuple(passages))
    facts = {"title": "All domains", "licence": "that of each", "attribution": "that of each"}
    return Domain("mix", **(parts | facts), checked=True)  # each one's parts are disjoint


def _compared(cells: pd.DataFrame, n_bootstrap: int, seed: int) -> pd.DataFrame:
    """Means over samples, and differences to the text's own cut with their intervals."""
    rng = np.random.default_rng(seed)
    grouped = {key: group for key, group in cells.groupby(["recovered", "cut", "text"], sort=False)}
    rows = []
    for (recovered, cut, text), group in grouped.items():
        # each [sample, passage]
        losses, tokens, characters = np.stack(group["passages"]).transpose(2, 0, 1)
        own = np.stack(grouped[recovered, text, text]["passages"])[..., 0]
        if len(losses) == 1 or len(own) == 1:  # one sample of one of them stands against each
            gaps = losses - own
        else:
            gaps = losses[: len(own)] - own[: len(losses)]
        difference, low, high = _interval(gaps, tokens[0], n_bootstrap, rng)
        logs = losses.sum(1) / tokens.sum(1)
        rows.append(
            {
                "recovered": recovered,
                "cut": cut,
                "text": text,
                "perplexity": np.exp(logs.mean()),
                "lowest": np.exp(logs.min()),
                "highest": np.exp(logs.max()),
                "draws": len(logs),
                "stored": group["stored"].iloc[0],
                "tokens": int(tokens[0].sum()),
                "bits_per_character": losses.sum(1).mean() / np.log(2) / characters[0].sum(),
                "difference": difference,
                "difference_low": low,
                "difference_high": high,
            }
        )
    table = pd.DataFrame(rows)
    table.attrs["wins"] = _wins(table)
    table.attrs["verdict"] = "; ".join(map(_verdict, table.attrs["wins"]))
    return table


def _interval(gaps: np.ndarray, tokens: np.ndarray, n: int, rng) -> tuple[float, float, float]:
    """Mean of gaps ``[sample, passage]`` in nats per token, and its 95 % bootstrap interval."""
    n_samples, n_passages = gaps.shape
    samples = rng.integers(n_samples, size=(n, n_samples))
    passages = rng.integers(n_passages, size=(n, n_passages))
    sums = gaps[samples[:, :, None], passages[:, None, :]].sum(2).mean(1)  # [n]
    low, high = np.quantile(sums / tokens[passages].sum(1), [0.025, 0.975])
    return gaps.sum(1).mean() / tokens.sum(), float(low), float(high)


def _wins(table: pd.DataFrame) -> list[dict]:
    """Per state (pruned, recovered): columns in which the diagonal is lowest, and how surely."""
    wins = []
    for recovered, part in table.groupby("recovered"):
        texts = list(dict.fromkeys(part["text"]))
        row = {"recovered": bool(recovered), "columns": len(texts)}
        foreign = part[part["cut"].isin(texts) & (part["cut"] != part["text"])].groupby("text")
        row["won"] = int((foreign["difference"].min() > 0).sum())
        row["surely"] = int((foreign["difference_low"].min() > 0).sum())
        for control in CONTROLS:
            rows = part[part["cut"] == control]
            row[f"beats_{control}"] = int((rows["difference"] > 0).sum())
        wins.append(row)
    return wins


def _verdict(row: dict) -> str:
    state, columns = "recovered" if row["recovered"] else "without recovery", row["columns"]
    controls = ", ".join(f"{name} in {row[f'beats_{name}']}" for name in CONTROLS)
    return (
        f"{state}: a domain's own cut is the best of all domains' in {row['won']} of {columns} "
        f"columns (in {row['surely']} with every 95 % interval above 0) and beats {controls}"
    )
