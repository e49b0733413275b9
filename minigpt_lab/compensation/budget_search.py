"""Search for the number of units to remove from every layer.

After Týr-the-Pruner (arXiv 2503.09657): a supernet holds every layer at several widths, the budget
whose predictions diverge least from the dense model's is searched on it, and the next supernet is
built around that budget. There, evolution tries 6,400 budgets per round; here, one backward pass
estimates the cost of every layer's units, and a gradient descent follows it.
"""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import partial

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..calibration import tokens_hash
from ..checks import (
    Batches,
    Flag,
    Integer,
    InvalidArgument,
    Location,
    Model,
    Number,
    OneOf,
    checked,
    refuse_unused,
)
from ..criteria import chosen_sites
from ..models import Anatomy, fingerprint, is_offloaded
from ..planning import (
    RATIO,
    RATIOS,
    most_units,
    one_target,
    parameters_to_remove,
    unit_counts,
    unit_steps,
)
from ..store import ResultCache, Shards
from .budgets import Budget, Budgets
from .calibration_windows import GENERALITY, CalibrationWindows
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
#: Share of the calibration windows on which budgets are compared.
HELD_OUT = 0.25
#: Share of a layer's units that the first steps may move.
STEP_SIZE = 0.04


@checked(
    model=Model(),
    batches=Batches(),
    ratio=RATIO,
    parameters=Integer() | None,
    ratio_of=OneOf(RATIOS),
    general=Batches() | None,
    generality=Number(0, 1),
    levels=Integer(1),
    drop_blocks=Flag(),
    rounds=Integer(1),
    steps=Integer(1),
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
    general: Iterable[dict[str, torch.Tensor]] | None = None,
    generality: float = GENERALITY,
    levels: int = 16,
    drop_blocks: bool = False,
    rounds: int = 2,
    steps: int = 60,
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

    A quarter of the calibration windows, evenly spaced, is held out: budgets are compared on them,
    and the supernet is fitted to the others. A step moves up to 4 % of a layer's units at first,
    half as much in every further round.

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
    general, generality
        Tokens of general text and their share, in the updated weights as in the divergence that is
        searched on; see `slimgpt`.
    levels : int
        Intervals between keeping all units of a layer's FFN (or attention) and the fewest possible.
    drop_blocks : bool
        Whether a layer's FFN or attention may lose all its units.
    rounds : int
        Number of supernets, each built around the best budget of the one before.
    steps : int
        Backward passes per round, each over up to 512 tokens (a window, if that is longer).
    seed : int
        Seed of the sampled windows and budgets.
    offload : {"device", "cpu", "disk"}
        Place of hidden states, levels and the dense predictions; see `Shards`.
    out_dir : str or path, optional
        Folder for ``search.json``, the finished rounds: an interrupted search continues there.
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
    target = one_target(ratio=ratio, parameters=parameters)
    if general is None:
        refuse_unused(search_counts, "general=None", generality=generality)
    _require_gradients(model)

    # 1. Sites, parameters to remove, and budgets of that size to start from.
    anatomy = Anatomy(model)
    sites = chosen_sites(model, sites, units)
    layer_sites = unscored_sites(anatomy, sites, keep_layers)
    divisors = unit_steps(layer_sites, multiple_of)
    dense = sum(parameter.numel() for parameter in model.parameters())
    size = math.floor(dense - parameters_to_remove(model, layer_sites, ratio, parameters, ratio_of))
    # with a unit left in every block; a search that drops blocks goes on from there
    most = most_units(layer_sites, divisors)
    narrowest = dense - sum(each.removed(n) for each, n in zip(layer_sites, most, strict=True))
    starts: dict[str, Budget] = {}
    for name in STARTS:
        rule = (max(size, narrowest) if drop_blocks else size, name, "model", multiple_of)
        starts[name] = tuple(unit_counts(model, layer_sites, None, *rule))

    # 2. Round after round, build a supernet around the starts and descend from the better one.
    held_out, others = CalibrationWindows(batches, general, generality).split(HELD_OUT)
    facts = {
        "model": fingerprint(model),
        "tokens": [tokens_hash(others.batches()), tokens_hash(held_out.batches())],
        "solver": settings.to_dict(),
        "sites": [[each.site, each.layer] for each in layer_sites],
    }
    if general is not None:
        facts["generality"] = generality

    def search_round(round_: int, budgets: Budgets, starts: dict[str, Budget]) -> dict:
        base = next(iter(starts.values()))
        with supernet(model, layer_sites, settings, offload) as net:
            net.fill(others, budgets.levels, base, progress)
            trials = Trials(net, held_out)
            return {"rows": _descend(trials, budgets, starts, round_, steps, seed, progress)}

    cache = ResultCache(out_dir and f"{out_dir}/search.json")
    history: list[dict] = []
    for round_ in range(rounds):
        budgets = Budgets.around(
            starts.values(), layer_sites, divisors, levels, dense - size, drop_blocks
        )
        key = [facts, starts, budgets.levels, budgets.target, steps, seed, round_]
        rows = cache.get(key, partial(search_round, round_, budgets, starts))["rows"]
        history += [{"round": round_, **row} for row in rows]
        if not (enough := [row for row in rows if row["enough"]]):
            raise ValueError(
                f"the target cannot be met: {dense - size:,} parameters would have to be removed; "
                f"the budgets that were found remove up to {max(row['removed'] for row in rows):,}"
            )
        best = min(enough, key=lambda row: row["kl"])
        starts = {"start": tuple(best["counts"])}

    # 3. The best budget of the last round.
    kl = {row["stage"]: row["kl"] for row in history if row["stage"] in STARTS}
    kl = {name: round(value, 6) for name, value in {**kl, "best": best["kl"]}.items()}
    effort = {"levels": levels, "rounds": rounds, "steps": steps, "seed": seed}
    effort |= {"drop_blocks": True} if drop_blocks else {}
    origin = {**target, "allocation": "search", "ratio_of": ratio_of}
    origin["search"] = {**effort, "kl": kl}
    totals = {site: anatomy.units(site) for site in sites}
    counts = by_layer(layer_sites, best["counts"], totals)
    return SearchedCounts(counts, origin, pd.DataFrame(history))


def is_search(allocation: object, drop_blocks: bool = False) -> bool:
    """Whether an allocation is the search for one, which alone can drop whole blocks.

    Raises
    ------
    InvalidArgument
        If blocks are to be dropped without a search.
    """
    searching = isinstance(allocation, str) and allocation == "search"
    if drop_blocks and not searching:
        raise InvalidArgument(
            f"drop_blocks is True and allocation is {allocation!r}; only a search chooses which "
            "blocks to drop: give allocation='search', or use lab.plan_dropping"
        )
    return searching


def _require_gradients(model: PreTrainedModel) -> None:
    """Refuse a search where no gradients can be computed."""
    if is_offloaded(model):
        raise ValueError(
            "the model's weights are offloaded: a search sets all its layers many times; use "
            "another allocation, or a device that holds the model"
        )
    if torch.is_inference_mode_enabled():
        raise ValueError("a search needs gradients: call it outside torch.inference_mode()")


def _descend(
    trials: Trials,
    budgets: Budgets,
    starts: Mapping[str, Budget],
    round_: int,
    steps: int,
    seed: int,
    progress: bool,
) -> list[dict]:
    """One round: descend from the best start; returns a row for every measured budget."""
    rows: list[dict] = []

    def measure(stage: str, budget: Budget) -> None:
        removed = int(budgets.removed(budget).sum())
        facts = {"removed": removed, "enough": removed >= budgets.target}
        kl, counts = trials.divergence(budget), [*budgets.trimmed(budget)]
        rows.append({"stage": stage, "kl": kl, **facts, "counts": counts})

    # 1. Measure the starts and begin at the best.
    for stage, budget in starts.items():
        measure(stage, budget)
    best = min(rows, key=lambda row: row["kl"])["stage"]
    descent = Descent(budgets, starts[best], [seed, round_])

    # 2. Descend along the slopes; now and then measure the nearest budget of levels.
    bar = tqdm(range(steps), f"search, round {round_ + 1}", unit="step", disable=not progress)
    for step in bar:
        window, sample = descent.sample(len(trials.held_out))
        below, above = budgets.neighbours(descent.removed)
        # slopes per parameter; 0 where the two levels are the same
        gaps = np.maximum(budgets.removed(above) - budgets.removed(below), 1)  # [site]
        slopes = trials.rises(window, sample, below, above) / gaps
        # the step size falls to 5 % by a cosine, and is halved in every round
        cosine = (1 + math.cos(math.pi * step / steps)) / 2
        descent.step(slopes, STEP_SIZE * (0.05 + 0.95 * cosine) / 2**round_)
        if (step + 1) * MEASURED // steps > step * MEASURED // steps:
            measure(f"step {step + 1}", budgets.nearest(descent.removed))
            bar.set_postfix(kl=f"{rows[-1]['kl']:.3f}")
    return rows
