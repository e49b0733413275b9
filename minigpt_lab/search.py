"""Which layers can spare how much: a layer budget searched by what it does to the predictions.

After Týr-the-Pruner (arXiv 2503.09657), which evaluates 6,400 budgets per round on a supernet and
keeps those whose predictions diverge least from the dense model's. Here an additive model of that
divergence is fitted to the budgets seen so far and proposes the next ones: some 150 will do.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch.nn import functional
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from .allocation import unit_counts, unit_steps
from .budgets import Budget, Budgets, group_costs, of_budget
from .compensation import Solver
from .ledger import Ledger, content_hash
from .offloading import is_offloaded
from .runtime import fingerprint
from .schedules import Group
from .shards import Shards
from .statistics import tokens_hash
from .supernet import Supernet, supernet
from .tokens import unpadded

#: Allocations that a search starts from; layers are calibrated on what the first makes of those
#: before them.
STARTS = ("uniform", "log-increase")


@dataclass(frozen=True)
class Search:
    """How long to search for a budget, and how finely.

    Parameters
    ----------
    levels : int
        Steps between a whole FFN (or all heads) of a layer and the least of it.
    tokens : int
        Calibration tokens on which budgets are compared: whole windows, evenly spaced. The supernet
        does not see them (if any are left): what was fitted to a text says little about others.
    generations, offspring : int
        Rounds of proposals, and how many budgets each evaluates.
    survivors : int
        Best budgets that a round's proposals are made from.
    seed : int
        Of the proposals.
    """

    levels: int = 8
    tokens: int = 1024
    generations: int = 10
    offspring: int = 8
    survivors: int = 4
    seed: int = 0

    def __post_init__(self):
        least = {"levels": 1, "tokens": 2, "generations": 0, "offspring": 1, "survivors": 1}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(f"search: {name} is {getattr(self, name)}; expected {low} or more")


def search_counts(
    model: PreTrainedModel,
    batches: Iterable[dict[str, torch.Tensor]],
    groups: Sequence[Group],
    leave: float,
    multiple_of: int | Mapping[str, int] = 1,
    options: Solver | None = None,
    search: Search | None = None,
    offload: str = "device",
    out_dir: str | os.PathLike | None = None,
    progress: bool = True,
) -> tuple[list[int], pd.DataFrame]:
    """How many units leave every group, so that the dense model's predictions change least.

    One walk finds the compensated weights of every group at several levels (see `supernet`). Then
    budgets of one size are compared by the mean KL divergence of the next token's distribution
    from the dense model's: the starts; the better start with one group after another moved, which
    says what that group's error (known at all its levels) costs; the optimum of the sum of those
    costs; and in every generation moves of parameters from group to group around the best budgets.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A supported causal language model; the same, bit for bit, afterwards.
    batches : iterable of dict
        Calibration tokens; padding is left out.
    groups : sequence of Group
        From `prunable`; scores are not used.
    leave : float
        Parameters that are to leave, at least.
    multiple_of : int or mapping
        See `plan_from_scores`.
    options : Solver, optional
        How units are chosen and the rest refitted.
    search : Search, optional
        How long and how finely.
    offload : {"device", "cpu", "disk"}
        Where hidden states, levels and the dense predictions wait; see `Shards`.
    out_dir : str or path, optional
        Folder for ``search.jsonl``, the evaluations so far: an interrupted search goes on there.
    progress : bool
        Show progress bars.

    Returns
    -------
    list of int, pandas.DataFrame
        Units that leave each group; one row per evaluation: ``stage`` (an allocation, "single",
        "additive", "generation"), ``kl``, ``removed`` (parameters), ``enough`` (of them),
        ``counts``.

    Raises
    ------
    ValueError
        If the size cannot be met, an option is out of range, or predictions are not finite.
    """
    if is_offloaded(model):
        raise ValueError(
            "the model's weights wait outside its device: a search sets all its layers many times; "
            "use another allocation, or a device that holds the model"
        )
    options, search = options or Solver(), search or Search()
    windows, steps = list(unpadded(batches)), unit_steps(groups, multiple_of)
    size = math.floor(sum(parameter.numel() for parameter in model.parameters()) - leave)
    starts = {
        name: unit_counts(model, groups, None, size, name, "model", multiple_of, even_out=True)
        for name in STARTS
    }
    budgets = Budgets.around(starts.values(), groups, steps, search.levels, leave)
    begin = {name: budgets.budget(counts) for name, counts in starts.items()}
    recipe = {
        "model": fingerprint(model),
        "tokens": _hash(windows),
        "solver": options.facts(),
        "sites": [[group.site, group.layer] for group in groups],
        "counts": budgets.counts,
        "base": begin[STARTS[0]],
    }
    chosen, others = _set_aside(windows, search.tokens)
    build = (others, groups, budgets.counts, begin[STARTS[0]], options, offload, progress)
    ledger = Ledger(out_dir and f"{out_dir}/search.jsonl")
    with _Trials(model, chosen, recipe, build, ledger) as trials:
        found = _evolve(trials, budgets, begin, search, progress)
    best = _best(found, 1)[0]
    history = pd.DataFrame(found.values())
    history["counts"] = [budgets.units(budget) for budget in history.pop("budget")]
    return budgets.filled(best["budget"]), history


def summary(history: pd.DataFrame) -> dict[str, object]:
    """Of a search: budgets tried, and the divergence of its starts and of what it found."""
    starts = history[history["stage"].isin(STARTS)].set_index("stage")["kl"]
    found = float(history[history["enough"]]["kl"].min())
    return {"tried": len(history), "kl": {**starts.round(6).to_dict(), "found": round(found, 6)}}


class _Trials:
    """How far the predictions at a budget are from the dense ones; a supernet is built if needed.

    Parameters
    ----------
    model, chosen
        What is measured, and the tokens ``[window, token]`` on which.
    recipe : dict
        What a divergence depends on, beside those tokens and the budget.
    build : tuple
        Arguments of `supernet` after the model.
    ledger : Ledger
        Where divergences are kept.
    """

    def __init__(self, model, chosen: list[torch.Tensor], recipe: dict, build: tuple, ledger):
        self.model, self.chosen, self.build, self.ledger = model, chosen, build, ledger
        self.recipe = content_hash([json.dumps(recipe, sort_keys=True)])
        self.text = _hash(chosen)
        self.net: Supernet | None = None
        self.dense = Shards(build[-2])
        self.stack = contextlib.ExitStack()

    def __enter__(self) -> _Trials:
        return self

    def __exit__(self, *_) -> None:
        self.stack.close()

    def divergence(self, budget: Budget) -> float:
        """Mean KL divergence of a token's predictions from the dense ones, in nats."""
        recipe = [self.recipe, self.text, budget]
        return self.ledger.get(recipe, lambda: {"kl": self._measured(budget)})["kl"]

    def errors(self) -> list[np.ndarray]:
        """Share of its output that each group loses at each level ``[group][level]``."""
        found = self.ledger.get([self.recipe], lambda: {"errors": self._supernet().errors()})
        return [np.array(levels) for levels in found["errors"]]

    def _supernet(self) -> Supernet:
        if self.net is None:
            self.net = self.stack.enter_context(supernet(self.model, *self.build))
            self.net.set_all((0,) * len(self.net.now))
            for index in range(len(self.chosen)):
                # float16 is the finer the more likely a token is, and so the more it counts
                self.dense[index] = self._predictions(index).half()
        return self.net

    def _measured(self, budget: Budget) -> float:
        self._supernet().set_all(budget)
        total = 0.0
        for index in range(len(self.chosen)):
            dense, found = self.dense[index].float(), self._predictions(index)
            total += float(functional.kl_div(found, dense, reduction="sum", log_target=True))
        if not math.isfinite(total):
            raise ValueError(
                "the pruned model's predictions are not finite: search in float32 or bfloat16"
            )
        return total / sum(ids.numel() for ids in self.chosen)

    def _predictions(self, index: int) -> torch.Tensor:
        ids = self.chosen[index].to(self.model.device)
        return self.model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)


def _evolve(
    trials: _Trials, budgets: Budgets, begin: Mapping[str, Budget], search: Search, progress: bool
) -> dict[Budget, dict]:
    """Every budget that was tried, to ``stage, kl, removed, enough, budget``."""
    rows: dict[Budget, dict] = {}
    rng, places = np.random.default_rng(search.seed), range(len(budgets.groups))
    errors = trials.errors()
    total = len(begin) + len(places) + search.generations * search.offspring
    with tqdm(total=total, desc="search", unit="budget", disable=not progress) as bar:

        def look(stage: str, budget: Budget) -> None:
            if budget not in rows:
                removed = budgets.removed(budget)
                row = {"stage": stage, "kl": trials.divergence(budget), "removed": removed}
                rows[budget] = {**row, "enough": removed >= budgets.leave, "budget": budget}
                bar.set_postfix(best=f"{_best(rows, 1)[0]['kl']:.3f}")
            bar.update()

        for name, budget in begin.items():
            look(name, budget)
        start = _best(rows, 1)[0]["budget"]
        for index in places:
            level = 0 if start[index] else min(1, len(budgets.counts[index]) - 1)
            look("single", (*start[:index], level, *start[index + 1 :]))
        for _ in range(search.generations):
            costs = group_costs({budget: row["kl"] for budget, row in rows.items()}, errors)
            cheapest = budgets.cheapest([c * e for c, e in zip(costs, errors, strict=True)])
            if budgets.removed(cheapest) >= budgets.leave:
                spent = costs * of_budget(errors, cheapest)
                look("additive", budgets.trimmed(cheapest, np.argsort(-spent)))
            parents = [row["budget"] for row in _best(rows, search.survivors)]
            for _ in range(search.offspring - 1):
                # what a group's error costs is a guess: every proposal takes another
                drawn = costs * rng.lognormal(0, 0.5, len(costs))
                pool = {budgets.moved(parent, rng) for parent in parents for _ in range(16)}
                fresh = sorted(pool - set(rows))
                if fresh:
                    prices = [drawn @ of_budget(errors, budget) for budget in fresh]
                    look("generation", fresh[int(np.argmin(prices))])
    return rows


def _best(rows: Mapping[Budget, dict], count: int) -> list[dict]:
    """The rows that meet the size and diverge least."""
    enough = [row for row in rows.values() if row["enough"]]
    return sorted(enough, key=lambda row: row["kl"])[:count]


def _set_aside(
    windows: Sequence[torch.Tensor], tokens: int
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Evenly spaced windows of so many tokens, in batches of up to 512, and the other windows."""
    rows = [row for ids in windows for row in ids]
    mean = sum(map(len, rows)) / len(rows)
    count = min(max(round(tokens / mean), 1), len(rows))
    places = np.linspace(0, len(rows) - 1, count).round().astype(int).tolist()
    chosen = []
    for length, same in itertools.groupby([rows[i] for i in places], len):
        chosen += torch.stack(list(same)).split(max(1, 512 // length))
    others = [rows[i][None] for i in sorted(set(range(len(rows))) - set(places))]
    return chosen, others or list(windows)


def _hash(windows: Sequence[torch.Tensor]) -> str:
    return tokens_hash({"input_ids": ids} for ids in windows)
