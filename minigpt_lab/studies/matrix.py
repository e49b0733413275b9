"""Is pruning contextual? Every domain's pruned model, measured on every domain, at one stored size.

If a model pruned for a domain keeps what that domain needs, then on the domain's held-out text it
beats the models pruned for other domains: the diagonal of the table wins its columns. Controls of
the same size know no domain (random units, smallest weights) or all of them (mix).
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..calibration import collect_statistics
from ..checks import DictOf, Instance, Integer, ListOf, Number, OneOf, checked
from ..criteria import score
from ..domains import Domain, Part, tokenize
from ..models import PruningPlan, shrink
from ..planning import plan_from_scores
from ..recovery import recover, require_ended
from ..store import content_hash
from .activations import set_overlap
from .arguments import FOLDER, PAIR, PROTOCOL
from .held_out import HeldOut

#: Plans that no domain has chosen: all domains together, random units, smallest weights.
CONTROLS = ("mix", "random", "magnitude")
_RESAMPLES = 1000  # of a bootstrap interval
Plans = Mapping[tuple[str, int], PruningPlan]


@checked(
    **PAIR,
    domains=ListOf(Instance(Domain)),
    ratio=Number(0, below=1),
    samples=Integer(1),
    calibration_tokens=Integer(1),
    seq_len=Integer(2),
    out_dir=FOLDER,
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
        Share of the FFN channels to remove in every layer: the same number everywhere, so that
        every plan stores the same number of parameters.
    samples : int
        Disjoint, contiguous pieces of each calibration part, a plan from each: what differs
        between them is noise. The random control changes its seed from sample to sample.
    calibration_tokens, seq_len : int
        Tokens per sample, and per window.
    out_dir : str or path, optional
        Folder in which the statistics are kept, so that a second call needs no pass.

    Returns
    -------
    dict
        ``(name, sample)`` to plan; the name is a domain's or one of `CONTROLS`. The mix has the
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
        batches = tokenize(
            domain.calibration, tokenizer, seq_len=seq_len, max_tokens=samples * calibration_tokens
        )
        available = sum(batch["input_ids"].numel() for batch in batches)
        if available < samples * (calibration_tokens // seq_len) * seq_len:
            raise ValueError(
                f"{domain.calibration} has {available} tokens, {samples} samples of "
                f"{calibration_tokens} need more; take fewer samples or calibration_tokens"
            )
        for sample, piece in enumerate(batches.samples(samples)):
            path = out_dir and Path(out_dir) / f"statistics-{domain.name}-{sample}.safetensors"
            statistics = collect_statistics(model, piece, path=path)
            scored[domain.name, sample] = "contextual", {"statistics": statistics}
    for sample in range(samples):
        first, *others = (scored[name, sample][1]["statistics"] for name in names)
        scored["mix", sample] = "contextual", {"statistics": sum(others, first)}
        scored["random", sample] = "random", {"seed": sample}
    scored["magnitude", 0] = "magnitude", {}

    # 2. A plan of the same size from each.
    return {
        key: plan_from_scores(
            model, score(model, criterion, sites=("ffn",), **options), ratio=ratio
        )
        for key, (criterion, options) in scored.items()
    }


@checked(plans=DictOf(Instance(tuple), Instance(PruningPlan)))
def kept_overlap(plans: Plans) -> pd.DataFrame:
    """Jaccard overlap of the units that two plans keep; of one domain: between its samples.

    Returns
    -------
    pandas.DataFrame
        As `set_overlap` gives it; a domain or control with one sample has no row.
    """
    kept: dict[str, list] = {}
    for (cut, _), plan in plans.items():
        kept.setdefault(cut, []).append(plan.kept_mask("ffn"))
    return set_overlap({cut: masks for cut, masks in kept.items() if len(masks) > 1})


@checked(
    **PAIR,
    **PROTOCOL,
    domains=ListOf(Instance(Domain), 1),
    plans=Instance(Mapping, "lab.domain_plans gives it"),
    recovery_tokens=Integer(0),
    recover_on=OneOf(["mix", "own"]),
    seed=Integer(0),
    out_dir=FOLDER,
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
    recover_on: str = "mix",
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
        If positive, the first pruned model of every domain and control (and the dense one) is also
        fine-tuned on this number of tokens.
    recover_on : {"mix", "own"}
        ``"mix"``: all on the same text, every domain's train part in equal shares, so that only the
        plan can make the difference. ``"own"``: a domain's model on that domain, as Mini-GPTs does;
        then the diagonal has been trained on its column, and wins for that reason too.
    seed : int
        Of the intervals and of the training.
    out_dir : str or path, optional
        Folder in which finished cells are kept: an interrupted matrix continues.
    **recovery
        Further arguments of `recover`: ``method, learning_rate, …``.

    Returns
    -------
    pandas.DataFrame
        One row per ``recovered, cut`` (the domain or control that the model was pruned for) and
        ``text``; ``perplexity`` (geometric mean over samples), ``lowest, highest`` (over samples),
        ``kl`` (from the dense model), ``draws`` (number of samples), ``stored, tokens,
        bits_per_character``, and ``difference, difference_low, difference_high``: log perplexity
        minus that of the text's own model, nats per token, positive where the own model is better;
        95 % bootstrap over passages (paired; NaN for a single one) and samples. How often the
        diagonal wins is said by ``attrs["verdict"]`` in words, by ``attrs["wins"]`` in numbers.

    Raises
    ------
    ValueError
        If a domain has no plan, or an argument is out of range.
    """
    names = [domain.name for domain in domains]
    missing = [name for name in names if (name, 0) not in plans]
    if missing:
        raise ValueError(f"no plan for {missing}; plans are of {sorted({cut for cut, _ in plans})}")
    own = {domain.name: domain for domain in domains}
    mix = mixed(domains) if recovery_tokens else None
    budget = {"max_tokens": recovery_tokens, "seq_len": seq_len, "seed": seed}
    budget |= {"eval_every": max(1, recovery_tokens // 2), **recovery}
    held_out = HeldOut(
        model,
        tokenizer,
        [domain.test for domain in domains],
        max_tokens=max_tokens,
        seq_len=seq_len,
        path=out_dir and Path(out_dir) / "cells.json",
    )

    def measured(plan: PruningPlan | None, train: Domain | None) -> dict:
        mini = shrink(model, plan) if plan else copy.deepcopy(model)
        if train is not None:
            require_ended(recover(mini, tokenizer, train, **budget))
        return held_out.measure(mini)

    cells, variants = [], []
    for (cut, sample), plan in {("dense", 0): None, **plans}.items():
        trains: list[Domain | None] = [None]
        if recovery_tokens and sample == 0:
            trains.append(own.get(cut, mix) if recover_on == "own" else mix)
        for train in trains:
            key: list = [plan and plan.keep]
            key += [content_hash([*train.train, *train.validation]), budget] if train else []
            cells.append({"recovered": train is not None, "cut": cut})
            variants.append((key, partial(measured, plan, train)))
    rows = []
    results = held_out.results(variants, "matrix", "model")
    for facts, result in zip(cells, results, strict=True):
        losses = held_out.perplexities(result)
        for name, loss, row in zip(names, losses, result["rows"], strict=True):
            numbers = {"text": name, "passages": loss.passages, "kl": row["kl"]}  # [passage, 3]
            rows.append({**facts, "stored": result["stored"], **numbers})
    return _compared(pd.DataFrame(rows), seed)


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
    parts |= dict.fromkeys(("licence", "attribution"), "that of each")
    # checked: each one's parts are disjoint
    return Domain("mix", title="All domains", checked=True, **parts)


def _compared(cells: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Means over samples, and differences to the text's own model with their intervals."""
    rng = np.random.default_rng(seed)
    grouped = {key: group for key, group in cells.groupby(["recovered", "cut", "text"], sort=False)}
    rows = []
    for (recovered, cut, text), group in grouped.items():
        # each [sample, passage]
        losses, tokens, characters = np.stack(group["passages"]).transpose(2, 0, 1)
        own = np.stack(grouped[recovered, text, text]["passages"])[..., 0]
        # a single sample is compared with each of the other's
        difference, low, high = _interval(losses - own, tokens[0], rng)
        logs = losses.sum(1) / tokens.sum(1)
        rows.append(
            {
                "recovered": recovered,
                "cut": cut,
                "text": text,
                "perplexity": np.exp(logs.mean()),
                "lowest": np.exp(logs.min()),
                "highest": np.exp(logs.max()),
                "kl": group["kl"].mean(),
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


def _interval(gaps: np.ndarray, tokens: np.ndarray, rng) -> tuple[float, float, float]:
    """Mean of gaps ``[sample, passage]`` in nats per token, and its 95 % bootstrap interval.

    NaN for fewer than two passages: one says nothing about others.
    """
    mean, scored = gaps.sum(1).mean() / tokens.sum(), tokens > 0
    gaps, tokens = gaps[:, scored], tokens[scored]
    if len(tokens) < 2:
        return mean, np.nan, np.nan
    samples, passages = (rng.integers(n, size=(_RESAMPLES, n)) for n in gaps.shape)
    sums = gaps[samples[:, :, None], passages[:, None, :]].sum(2).mean(1)  # [n]
    low, high = np.quantile(sums / tokens[passages].sum(1), [0.025, 0.975])
    return mean, float(low), float(high)


def _wins(table: pd.DataFrame) -> list[dict]:
    """Per state (pruned, recovered): columns in which the diagonal is lowest, and how surely."""
    wins = []
    for recovered, part in table.groupby("recovered"):
        foreign = part[part["cut"].isin(part["text"]) & (part["cut"] != part["text"])]
        lowest = foreign.groupby("text")[["difference", "difference_low"]].min() > 0
        beaten = part.loc[part["difference"] > 0, "cut"].value_counts()
        row = {"recovered": bool(recovered), "columns": part["text"].nunique()}
        row |= {"won": int(lowest["difference"].sum())}
        row |= {"surely": int(lowest["difference_low"].sum())}
        wins.append(row | {f"beats_{name}": int(beaten.get(name, 0)) for name in CONTROLS})
    return wins


def _verdict(row: dict) -> str:
    state, columns = "recovered" if row["recovered"] else "without recovery", row["columns"]
    controls = ", ".join(f"{name} in {row[f'beats_{name}']}" for name in CONTROLS)
    return (
        f"{state}: a domain's own cut is the best of all domains' in {row['won']} of {columns} "
        f"columns (in {row['surely']} with every 95 % interval above 0) and beats {controls}"
    )
