"""Is pruning contextual? Every domain's cut, measured on every domain, at one stored size.

If a model cut for a domain keeps what that domain needs, then on the domain's held-out text it
beats the models cut for other domains: the diagonal of the table wins its columns. Beside it stand
cuts of the same size that know no domain (random units, smallest weights) and one that knows all.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

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
from .analysis import set_overlap

#: Cuts that no domain has chosen: all domains together, random units, smallest weights.
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
        Which of ``"ffn"`` and ``"attention"`` to cut.
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
    plans = {}

    def add(cut: str, draw: int, criterion: str, **how) -> None:
        scores = score(model, criterion, sites=sites, **how)
        plans[cut, draw] = plan_from_scores(model, scores, ratio=ratio)

    found = {}
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
        for draw, batch in enumerate(batches.samples(samples)):
            path = out_dir and Path(out_dir) / f"statistics-{domain.name}-{draw}.safetensors"
            found[domain.name, draw] = collect_statistics(model, batch, path=path)
            add(domain.name, draw, "contextual", statistics=found[domain.name, draw])
    for draw in range(samples):
        first, *rest = (found[name, draw] for name in names)
        add("mix", draw, "contextual", statistics=sum(rest, first))
        add("random", draw, "random", seed=draw)
    add("magnitude", 0, "magnitude")
    return plans


@checked(plans=DictOf(Instance(tuple), Instance(PruningPlan)))
def kept_overlap(plans: Plans) -> pd.DataFrame:
    """Jaccard overlap of the units that two cuts keep; a cut with itself: between its draws.

    Returns
    -------
    pandas.DataFrame
        As `set_overlap` gives it; cuts with a single draw are left out.
    """
    kept: dict[str, list] = {}
    for (cut, _), plan in plans.items():
        kept.setdefault(cut, []).append(_flags(plan))
    return set_overlap({cut: draws for cut, draws in kept.items() if len(draws) > 1})


def _flags(plan: PruningPlan) -> list[np.ndarray]:
    """Per site and layer, whether each unit stays; sites that lose nothing say nothing."""
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
    """Held-out perplexity of every cut on every domain, and how far each is from the diagonal.

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
        If positive, cuts (and the dense model, as a control) are fine-tuned on so many tokens, too.
    recovery_samples : int
        Of how many samples; the others are measured without recovery only.
    recover_on : {"mix", "own"}
        ``"mix"``: all on the same text, every domain's train part in equal shares, so that only the
        cut can make the difference. ``"own"``: a domain's cut on that domain, as Mini-GPTs does;
        then the diagonal has been trained on its column, and wins for that reason too.
    n_bootstrap, seed : int
        Of the intervals; the seed also orders the training.
    out_dir : str or path, optional
        Folder in which finished cells are kept: an interrupted matrix goes on where it stopped.
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
    jobs = [("dense", 0, None), *((cut, draw, plan) for (cut, draw), plan in plans.items())]
    cells = _Cells(
        model, tokenizer, texts, seq_len, ResultCache(out_dir and f"{out_dir}/cells.jsonl")
    )
    rows = []
    for cut, draw, plan in tqdm(jobs, desc="matrix", unit="model"):
        rows += cells.measure(cut, draw, plan)
        if recovery_tokens and draw < recovery_samples:
            text = own.get(cut, mix) if recover_on == "own" else mix
            how = {"max_tokens": recovery_tokens, "seq_len": seq_len, "seed": seed, **recovery}
            rows += cells.measure(cut, draw, plan, text, how)
    return _compared(pd.DataFrame(rows), n_bootstrap, seed)


class _Cells:
    """Measures one model on all texts; what the ledger knows is not computed again."""

    def __init__(self, model, tokenizer, texts: dict[str, Part], seq_len: int, ledger: ResultCache):
        self.model, self.tokenizer, self.texts = model, tokenizer, texts
        self.seq_len, self.ledger = seq_len, ledger

    def measure(self, cut, draw, plan, train: Domain | None = None, how: dict | None = None):
        """Rows of one model, recovered on a domain if one is given."""
        mini = None  # made when the first cell asks for it
        recipe = [fingerprint(self.model), plan and plan.keep, self.seq_len, how]
        recipe += [content_hash([*train.train, *train.validation])] if train else []
        rows = []
        for name, text in self.texts.items():

            def measured(text=text) -> dict:
                nonlocal mini
                mini = mini or self._made(plan, train, how)
                found = perplexity(
                    mini,
                    self.tokenizer,
                    text,
                    seq_len=self.seq_len,
                    max_characters=None,
                    n_bootstrap=1,
                    progress=False,
                )
                return {"stored": model_size(mini).stored, "passages": found.passages.tolist()}

            found = self.ledger.get([*recipe, content_hash(text)], measured)
            facts = {"recovered": train is not None, "cut": cut, "text": name, "draw": draw}
            rows.append({**facts, **found, "passages": np.array(found["passages"])})
        return rows

    def _made(self, plan, train, how):
        mini = shrink(self.model, plan) if plan else copy.deepcopy(self.model)
        if train is not None:
            recover(
                mini, self.tokenizer, train, **{"eval_every": max(1, how["max_tokens"] // 2), **how}
            )
        return mini


@checked(domains=ListOf(Instance(Domain), 1))
def mixed(domains: Sequence[Domain]) -> Domain:
    """The domains' train and validation parts taken in turn, in equal shares of bytes."""
    parts = {}
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
    return Domain("mix", **facts, **parts, checked=True)  # each one's parts are disjoint


def _compared(cells: pd.DataFrame, n_bootstrap: int, seed: int) -> pd.DataFrame:
    """Means over draws, and differences to the text's own cut with their intervals."""
    rng = np.random.default_rng(seed)
    grouped = {key: group for key, group in cells.groupby(["recovered", "cut", "text"], sort=False)}
    rows = []
    for (recovered, cut, text), group in grouped.items():
        losses, tokens, characters = np.stack(group["passages"]).transpose(2, 0, 1)
        own = np.stack(grouped[recovered, text, text]["passages"])[..., 0]
        if len(losses) == 1 or len(own) == 1:  # one draw of one of them stands against each
            gaps = losses - own
        else:
            gaps = losses[: len(own)] - own[: len(losses)]
        difference, low, high = _interval(gaps, tokens[0], n_bootstrap, rng)
        logs = losses.sum(1) / tokens.sum(1)
        rows.append(
            {
                "recovered": recovered, "cut": cut, "text": text,
                "perplexity": np.exp(logs.mean()), "lowest": np.exp(logs.min()),
                "highest": np.exp(logs.max()), "draws": len(logs),
                "stored": group["stored"].iloc[0], "tokens": int(tokens[0].sum()),
                "bits_per_character": losses.sum(1).mean() / np.log(2) / characters[0].sum(),
                "difference": difference, "difference_low": low, "difference_high": high,
            }
        )  # fmt: skip
    table = pd.DataFrame(rows)
    table.attrs["wins"] = _wins(table)
    table.attrs["verdict"] = "; ".join(map(_verdict, table.attrs["wins"]))
    return table


def _interval(gaps: np.ndarray, tokens: np.ndarray, n: int, rng) -> tuple[float, float, float]:
    """Mean of gaps ``[draw, passage]`` in nats per token, and its 95 % bootstrap interval."""
    draws, passages = gaps.shape
    some = rng.integers(draws, size=(n, draws))
    those = rng.integers(passages, size=(n, passages))
    sums = gaps[some[:, :, None], those[:, None, :]].sum(2).mean(1)
    low, high = np.quantile(sums / tokens[those].sum(1), [0.025, 0.975])
    return gaps.sum(1).mean() / tokens.sum(), float(low), float(high)


def _wins(table: pd.DataFrame) -> list[dict]:
    """Per state (pruned, recovered): columns in which the diagonal is lowest, and how surely."""
    found = []
    for recovered, part in table.groupby("recovered"):
        texts = list(dict.fromkeys(part["text"]))
        row = {"recovered": bool(recovered), "columns": len(texts)}
        foreign = part[part["cut"].isin(texts) & (part["cut"] != part["text"])].groupby("text")
        row["won"] = int((foreign["difference"].min() > 0).sum())
        row["surely"] = int((foreign["difference_low"].min() > 0).sum())
        for control in CONTROLS:
            rows = part[part["cut"] == control]
            row[f"beats_{control}"] = int((rows["difference"] > 0).sum())
        found.append(row)
    return found


def _verdict(row: dict) -> str:
    state, columns = "recovered" if row["recovered"] else "without recovery", row["columns"]
    controls = ", ".join(f"{name} in {row[f'beats_{name}']}" for name in CONTROLS)
    return (
        f"{state}: a domain's own cut is the best of all domains' in {row['won']} of {columns} "
        f"columns (in {row['surely']} with every 95 % interval above 0) and beats {controls}"
    )
