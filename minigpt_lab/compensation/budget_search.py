"""Search for the number of units to remove from every layer.

After Týr-the-Pruner (arXiv 2503.09657): a supernet holds every layer at several widths, the budget
whose predictions diverge least from the dense model's is searched on it, and the next supernet is
built around that budget. There, evolution tries 6,400 budgets per round; here, one backward pass
estimates the cost of every layer's units, and a gradient descent follows it.
"""

from __future__ import annotations

import inspect
import itertools
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..calibration import tokens_hash
from ..checks import Batches, Flag, Integer, Location, Model, Number, OneOf, checked
from ..criteria import chosen_sites
from ..domains import unpadded
from ..models import Anatomy, fingerprint, is_offloaded
from ..planning import LayerSite, one_target, parameters_to_remove, unit_counts, unit_steps
from ..store import ResultCache, Shards
from .budgets import Budget, Budgets
from .descent import Descent
from .layer_counts import SearchedCounts, by_layer, unscored_sites
from .solver import Solver
from .supernetwork import supernet
from .trials import Trials

#: Allocations that a search compares first, to start from the better one. The first supernet is
#: calibrated on the outputs of the first of them.
STARTS = ("uniform", "log-increase")
#: Budgets that are measured on all windows in every round, beside the starts.
MEASURED = 4


@dataclass(frozen=True)
class Effort:
    """Settings of the descent: its length, step size and levels; see `search_counts`."""

    levels: int
    validation_fraction: float
    rounds: int
    steps: int
    step_size: float
    seed: int

    @property
    def passes(self) -> int:
        """Backward passes and measurements in all."""
        return self.rounds * (self.steps + min(MEASURED, self.steps) + 1) + len(STARTS) - 1

    def step_size_at(self, round_: int, step: int) -> float:
        """Step size of a step: halved in every round, and within it down to 5 % by a cosine."""
        cosine = (1 + math.cos(math.pi * step / self.steps)) / 2
        return self.step_size * (0.05 + 0.95 * cosine) / 2**round_

    def measures_after(self, step: int) -> bool:
        """Whether to measure the budget after a step: `MEASURED` times a round, evenly spaced."""
        return (step + 1) * MEASURED // self.steps > step * MEASURED // self.steps


@checked(
    model=Model(),
    batches=Batches(),
    ratio=Number() | None,
    parameters=Integer() | None,
    levels=Integer(1),
    validation_fraction=Number(above=0, high=1),
    rounds=Integer(1),
    steps=Integer(1),
    step_size=Number(above=0, high=1),
    seed=Integer(0),
    offload=OneOf(Shards.PLACES),
    out_dir=Location() | None,
    progress=Flag(),
)
def search_counts(
    model: PreTrainedModel,
    batches: Iterable[dict[str, torch.Tensor]],
    *,
    ratio: float | None = None,
    parameters: int | None = None,
    sites: Sequence[str] = ("ffn", "attention"),
    units: str = "kv_group",
    ratio_of: str = "units",
    keep_layers: tuple[int, int] = (0, 0),
    multiple_of: int | Mapping[str, int] = 1,
    levels: int = 16,
    validation_fraction: float = 0.25,
    rounds: int = 2,
    steps: int = 60,
    step_size: float = 0.04,
    seed: int = 0,
    offload: str = "device",
    out_dir: str | os.PathLike | None = None,
    progress: bool = True,
    **solver,
) -> SearchedCounts:
    """Search how many units to remove from every layer, so that predictions change least.

    Every round, one pass over the calibration tokens computes updated weights at several levels for
    every layer's heads and channels (see `Supernet`), and `Descent` moves through budgets of one
    size, against the mean KL divergence of the next token's distribution from the dense model's.
    Four times per round the nearest budget of whole levels is measured on all held-out windows; the
    next round is built around the best.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A supported causal language model; the same, bit for bit, afterwards.
    batches : iterable of dict
        Calibration tokens; padding is left out.
    ratio, parameters : float, int
        Share to remove, or largest number of stored parameters; give one of them.
    sites, units, ratio_of, keep_layers, multiple_of
        As for `slimgpt`.
    levels : int
        Intervals between keeping all units of a layer's FFN (or attention) and the fewest possible.
    validation_fraction : float
        Share of the calibration windows, evenly spaced, on which budgets are compared. The
        supernet is not fitted to them, if any others are left.
    rounds : int
        Number of supernets, each built around the best budget of the one before.
    steps : int
        Backward passes per round, each over up to 512 tokens (a window, if that is longer).
    step_size : float
        Share of a layer's units that a step may move at first; half as much in every further round.
    seed : int
        Seed of the sampled windows and budgets.
    offload : {"device", "cpu", "disk"}
        Place of hidden states, levels and the dense predictions; see `Shards`.
    out_dir : str or path, optional
        Folder for ``search.jsonl``, the finished measurements: an interrupted search continues.
    progress : bool
        Show progress bars.
    **solver
        Fields of `minigpt_lab.compensation.Solver`, as for `slimgpt`.

    Returns
    -------
    SearchedCounts
        Site to the number of units to remove from every layer: `counts` of `slimgpt`.

    Raises
    ------
    ValueError
        If the size cannot be met, an option is out of range, or predictions are not finite.
    """
    settings = Solver.from_options(solver, inspect.signature(search_counts).parameters)
    effort = Effort(levels, validation_fraction, rounds, steps, step_size, seed)
    target = one_target(ratio=ratio, parameters=parameters)
    _require_gradients(model)

    # 1. Sites, parameters to remove, and budgets to start from.
    anatomy = Anatomy(model)
    sites = chosen_sites(model, sites, units)
    layer_sites = unscored_sites(anatomy, sites, keep_layers)
    dense = sum(parameter.numel() for parameter in model.parameters())
    size = math.floor(dense - parameters_to_remove(model, layer_sites, ratio, parameters, ratio_of))
    starts = {
        name: unit_counts(model, layer_sites, None, size, name, "model", multiple_of, even_out=True)
        for name in STARTS
    }

    # 2. Round after round, a supernet and a descent over its budgets.
    search = _BudgetSearch(
        model,
        windows=list(unpadded(batches)),
        layer_sites=layer_sites,
        divisors=unit_steps(layer_sites, multiple_of),
        remove=dense - size,
        solver=settings,
        effort=effort,
        offload=offload,
        cache=ResultCache(out_dir and f"{out_dir}/search.jsonl"),
        progress=progress,
    )
    history = search.run(starts)

    # 3. The best budget of the last round.
    last = history[history["enough"] & (history["round"] == history["round"].max())]
    best = last.loc[last["kl"].idxmin()]
    kl = history[history["stage"].isin(STARTS)].set_index("stage")["kl"].round(6).to_dict()
    origin = {**target, "allocation": "search", "ratio_of": ratio_of}
    origin["search"] = {**asdict(effort), "kl": {**kl, "found": round(float(best["kl"]), 6)}}
    totals = {site: anatomy.units(site) for site in sites}
    return SearchedCounts(by_layer(layer_sites, best["counts"], totals), origin, history)


def _require_gradients(model: PreTrainedModel) -> None:
    """Refuse a search where no gradients can be computed."""
    if is_offloaded(model):
        raise ValueError(
            "the model's weights are offloaded: a search sets all its layers many times; use "
            "another allocation, or a device that holds the model"
        )
    if torch.is_inference_mode_enabled():
        raise ValueError("a search needs gradients: call it outside torch.inference_mode()")


@dataclass(frozen=True)
class _BudgetSearch:
    """The rounds of a search, with the settings that they share."""

    model: PreTrainedModel
    windows: Sequence[torch.Tensor]  # tokens [window, token]
    layer_sites: Sequence[LayerSite]
    divisors: Sequence[int]  # a divisor of the number of kept units, for each site
    remove: float  # parameters to remove
    solver: Solver
    effort: Effort
    offload: str
    cache: ResultCache
    progress: bool

    def run(self, starts: Mapping[str, Sequence[int]]) -> pd.DataFrame:
        """Run all rounds, the first from `starts`; returns a row for every measured budget."""
        history: list[dict] = []
        with tqdm(
            total=self.effort.passes, desc="search", unit="pass", disable=not self.progress
        ) as bar:
            for round_ in range(self.effort.rounds):
                rows = self._round(round_, starts, bar.update)
                best = min((row for row in rows if row["enough"]), key=lambda row: row["kl"])
                bar.set_postfix(kl=f"{best['kl']:.3f}")
                starts = {"start": best["counts"]}
                history += rows
        return pd.DataFrame(history)

    def _round(
        self, round_: int, starts: Mapping[str, Sequence[int]], advance: Callable[[], object]
    ) -> list[dict]:
        """Build a supernet around the starts and descend; returns rows of the measured budgets.

        Parameters
        ----------
        round_ : int
            Index of the round.
        starts : mapping
            Stage to the units to remove from each layer site; the descent begins at the best.
        advance : callable
            Called after every pass, for the progress bar.
        """
        # 1. Budgets with levels at the counts of the starts.
        budgets = Budgets.around(
            starts.values(), self.layer_sites, self.divisors, self.effort.levels, self.remove
        )
        begin = {stage: budgets.from_counts(counts) for stage, counts in starts.items()}
        base = next(iter(begin.values()))
        held_out, others = split_windows(self.windows, self.effort.validation_fraction)
        facts = {
            "model": fingerprint(self.model),
            "tokens": _hash(self.windows),
            "chosen": _hash(held_out),
            "solver": self.solver.to_dict(),
            "sites": [[each.site, each.layer] for each in self.layer_sites],
            "counts": budgets.counts,
            "base": base,
        }
        levels = (self.layer_sites, budgets.counts, self.solver, self.offload)
        rows: list[dict] = []
        with supernet(self.model, *levels) as net:
            trials = Trials(net, base, others, held_out, self.cache, facts, self.progress)

            def measure(stage: str, budget: Budget) -> None:
                row = measured(trials, budgets, budget)
                rows.append({"round": round_, "stage": stage, **row})
                advance()

            # 2. Measure the starts and begin at the best.
            for stage, budget in begin.items():
                measure(stage, budget)
            best = min(rows, key=lambda row: row["kl"])["stage"]
            descent = Descent(budgets, begin[best], [self.effort.seed, round_])

            # 3. Descend along the slopes per parameter; now and then measure the nearest budget.
            for step in range(self.effort.steps):
                window, below, sample = descent.sample(len(held_out))
                slopes = trials.slopes(window, below, sample) / budgets.gaps(below)
                descent.step(slopes, self.effort.step_size_at(round_, step))
                advance()
                if self.effort.measures_after(step):
                    measure(f"step {step + 1}", budgets.nearest(descent.removed))
        return rows


def measured(trials: Trials, budgets: Budgets, budget: Budget) -> dict:
    """Measure one budget: its row of `SearchedCounts.history`, without round and stage."""
    removed = int(budgets.removed(budget).sum())
    return {
        "kl": trials.divergence(budget),
        "removed": removed,
        "enough": removed >= budgets.target,
        "counts": budgets.trimmed(budget),
    }


def split_windows(
    windows: Sequence[torch.Tensor], fraction: float
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Split windows into held-out ones, evenly spaced, and the others.

    Held-out windows of one length are joined into batches of up to 512 tokens. If all are held out,
    the others are all windows again.
    """
    rows = [row for ids in windows for row in ids]
    count = max(round(len(rows) * fraction), 1)
    chosen = np.linspace(0, len(rows) - 1, count).round().astype(int).tolist()
    held_out = []
    for length, group in itertools.groupby(sorted((rows[i] for i in chosen), key=len), len):
        held_out += torch.stack(list(group)).split(max(1, 512 // length))  # [window, token]
    others = [rows[i][None] for i in sorted(set(range(len(rows))) - set(chosen))]
    return held_out, others or list(windows)


def _hash(windows: Sequence[torch.Tensor]) -> str:
    """Hash of token windows."""
    return tokens_hash({"input_ids": ids} for ids in windows)
