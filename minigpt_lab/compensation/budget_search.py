"""The search, round by round: a supernet, a descent over its budgets, the next supernet around it.

After Týr-the-Pruner (arXiv 2503.09657), which finds a budget on a supernet by how far predictions
diverge from the dense model's, and builds the next supernet around it. There evolution looks at
6,400 budgets per round; here one backward pass says what every group would cost.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..calibration import tokens_hash
from ..checks import (
    Batches,
    Flag,
    Instance,
    Integer,
    ListOf,
    Location,
    Model,
    Number,
    check_fields,
    checked,
)
from ..domains import unpadded
from ..models import fingerprint, is_offloaded
from ..planning import LayerSite, unit_counts, unit_steps
from ..store import ResultCache, Shards
from .budgets import Budget, Budgets
from .descent import Descent
from .layer import Solver
from .supernetwork import supernet
from .trials import Trials

#: Allocations that a search starts from: the better one; its first supernet is calibrated on what
#: the first of them makes of the layers before.
STARTS = ("uniform", "log-increase")
#: How many budgets of every round are measured on all windows, beside those it starts from.
MEASURED = 4


@dataclass(frozen=True)
class Search:
    """How long to search for a budget, and how finely.

    Parameters
    ----------
    levels : int
        Steps between a whole FFN (or all heads) of a layer and the least of it.
    share : float
        Of the calibration windows, evenly spaced, on which budgets are compared. The supernet does
        not see them (if any are left): what was fitted to a text says little about others.
    rounds : int
        Supernets, each built around the budget that the one before gave.
    steps : int
        Backward passes per round, each over up to 512 tokens (a window, if that is longer).
    rate : float
        Share of a group that a step may move at first; half as much in every further round.
    seed : int
        Of the draws.
    """

    levels: int = 16
    share: float = 0.25
    rounds: int = 2
    steps: int = 60
    rate: float = 0.04
    seed: int = 0

    def __post_init__(self):
        whole, share = Integer(1), Number(above=0, high=1)
        check_fields(
            self, levels=whole, share=share, rounds=whole, steps=whole, rate=share, seed=Integer(0)
        )


@checked(
    model=Model(), batches=Batches(), groups=ListOf(Instance(LayerSite), 1), leave=Number(),
    options=Instance(Solver) | None, search=Instance(Search) | None, out_dir=Location() | None,
    progress=Flag(),
)  # fmt: skip
def search_counts(
    model: PreTrainedModel,
    batches: Iterable[dict[str, torch.Tensor]],
    groups: Sequence[LayerSite],
    leave: float,
    multiple_of: int | Mapping[str, int] = 1,
    options: Solver | None = None,
    search: Search | None = None,
    offload: str = "device",
    out_dir: str | os.PathLike | None = None,
    progress: bool = True,
) -> tuple[list[int], pd.DataFrame]:
    """How many units leave every group, so that the dense model's predictions change least.

    Every round, one walk finds the compensated weights of every group at several levels (see
    `supernet`), and `Descent` moves through budgets of one size, against the mean KL divergence of
    the next token's distribution from the dense model's. Now and then the nearest budget of whole
    levels is measured on all windows; the next round is built around the best.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A supported causal language model; the same, bit for bit, afterwards.
    batches : iterable of dict
        Calibration tokens; padding is left out.
    groups : sequence of LayerSite
        From `prunable_sites`; scores are not used.
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
        Folder for ``search.jsonl``, what was measured so far: an interrupted search goes on there.
    progress : bool
        Show progress bars.

    Returns
    -------
    list of int, pandas.DataFrame
        Units that leave each group; one row per budget that was measured: ``round``, ``stage`` (an
        allocation, "start", "step 12"), ``kl``, ``removed`` (parameters), ``enough`` (of them), and
        ``counts``, units that leave each group once FFN channels beyond need, which are gone in the
        other columns, are given back.

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
    if torch.is_inference_mode_enabled():
        raise ValueError("a search needs gradients: call it outside torch.inference_mode()")
    options, search = options or Solver(), search or Search()
    windows, steps = list(unpadded(batches)), unit_steps(groups, multiple_of)
    total = sum(parameter.numel() for parameter in model.parameters())
    size = math.floor(total - leave)
    leave = total - size
    starts = {
        name: unit_counts(model, groups, None, size, name, "model", multiple_of, even_out=True)
        for name in STARTS
    }
    chosen, others = _set_aside(windows, search.share)
    facts = {
        "model": fingerprint(model),
        "tokens": _hash(windows),
        "chosen": _hash(chosen),
        "solver": options.facts(),
        "sites": [[group.site, group.layer] for group in groups],
    }
    ledger = ResultCache(out_dir and f"{out_dir}/search.jsonl")
    history: list[dict] = []
    passes = search.rounds * (search.steps + min(MEASURED, search.steps) + 1) + len(starts) - 1
    with tqdm(total=passes, desc="search", unit="pass", disable=not progress) as bar:
        for turn in range(search.rounds):
            budgets = Budgets.around(starts.values(), groups, steps, search.levels, leave)
            begin = {name: budgets.budget(counts) for name, counts in starts.items()}
            base = next(iter(begin.values()))
            build = (others, groups, base, options, offload, progress)
            recipe = {**facts, "counts": budgets.counts, "base": base}
            with supernet(model, groups, budgets.counts, offload) as net:
                trials = Trials(model, chosen, recipe, net, build, Shards(offload), ledger)
                rows = list(_descend(trials, budgets, begin, search, turn, bar.update))
            best = min((row for row in rows if row["enough"]), key=lambda row: row["kl"])
            bar.set_postfix(kl=f"{best['kl']:.3f}")
            starts = {"start": best["counts"]}
            history += rows
    return best["counts"], pd.DataFrame(history)


def summary(history: pd.DataFrame) -> dict[str, object]:
    """Of a search: the divergence of its starts, and in the last round of what it found."""
    starts = history[history["stage"].isin(STARTS)].set_index("stage")["kl"]
    last = history[history["enough"] & (history["round"] == history["round"].max())]
    return {"kl": {**starts.round(6).to_dict(), "found": round(float(last["kl"].min()), 6)}}


def _descend(
    trials: Trials,
    budgets: Budgets,
    begin: Mapping[str, Budget],
    search: Search,
    turn: int,
    done: Callable[[], object],
) -> Iterator[dict]:
    """Rows of the budgets that one round measured."""

    def look(stage: str, budget: Budget) -> dict:
        removed = int(budgets.gone(budget).sum())
        row = {"round": turn, "stage": stage, "kl": trials.divergence(budget), "removed": removed}
        done()
        return {**row, "enough": removed >= budgets.leave, "counts": budgets.filled(budget)}

    rows = {name: look(name, budget) for name, budget in begin.items()}
    yield from rows.values()
    start = begin[min(rows, key=lambda name: rows[name]["kl"])]
    descent = Descent(budgets, start, [search.seed, turn])
    for step in range(search.steps):
        window, below, drawn = descent.draw(len(trials.chosen))
        cooled = 0.05 + 0.95 * (1 + math.cos(math.pi * step / search.steps)) / 2
        slopes = trials.slopes(window, below, drawn)
        descent.step(slopes / budgets.rises(below), search.rate * cooled / 2**turn)
        done()
        if (step + 1) * MEASURED // search.steps > step * MEASURED // search.steps:
            yield look(f"step {step + 1}", budgets.nearest(descent.gone))


def _set_aside(
    windows: Sequence[torch.Tensor], share: float
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Evenly spaced windows, in batches of up to 512 tokens, and the other windows."""
    rows = [row for ids in windows for row in ids]
    count = max(round(len(rows) * share), 1)
    places = np.linspace(0, len(rows) - 1, count).round().astype(int).tolist()
    chosen = []
    for length, same in itertools.groupby(sorted((rows[i] for i in places), key=len), len):
        chosen += torch.stack(list(same)).split(max(1, 512 // length))
    others = [rows[i][None] for i in sorted(set(range(len(rows))) - set(places))]
    return chosen, others or list(windows)


def _hash(windows: Sequence[torch.Tensor]) -> str:
    return tokens_hash({"input_ids": ids} for ids in windows)
