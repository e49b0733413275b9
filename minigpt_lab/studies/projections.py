"""The two pruned projections (o, down) of one layer: what they read, and losses of pruning them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
import torch
from transformers import PreTrainedModel

from ..calibration import LayerRunner, catch_inputs, damped_inverse, refit
from ..checks import DictOf, Instance, Integer, Model, Text, checked
from ..compensation import (
    Problem,
    Solver,
    full_precision,
    quadratic_form,
    read_problem,
    reconstruction_loss,
    solve,
)
from ..models import Anatomy, inference
from ..store import Shards
from .arguments import BATCHES, SHARES


@checked(model=Model(), batches=BATCHES, layer=Integer(0))
def layer_problems(
    model: PreTrainedModel, batches: Sequence[dict], *, layer: int
) -> dict[str, Problem]:
    """Second moments of what the two pruned projections (o, down) read in one dense layer.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A supported causal language model; not changed.
    batches : sequence of dict
        Calibration tokens.
    layer : int
        Which layer.
    """
    anatomy, hidden = Anatomy(model), Shards()
    with inference(model), full_precision():
        calls = catch_inputs(model, batches, hidden)
        for index in range(layer):
            LayerRunner(anatomy, index, hidden, calls).finish()
        runner = LayerRunner(anatomy, layer, hidden, calls)
        return {
            site: read_problem(anatomy, runner, layer, site, Solver())
            for site in ("attention", "ffn")  # in the order of the data flow
        }


@checked(problems=DictOf(Text(), Instance(Problem), 1), ratios=SHARES)
def layer_losses(problems: Mapping[str, Problem], ratios: Sequence[float]) -> pd.DataFrame:
    """Loss of one layer's projections, with units chosen or at random, compensated or not.

    Parameters
    ----------
    problems : mapping
        From `layer_problems`.
    ratios : sequence of float
        Shares of units to remove, rounded to whole units.

    Returns
    -------
    pandas.DataFrame
        Columns ``site, units, leave`` (number of removed units), ``share`` (of them), ``choice``
        (SlimGPT, random), ``draw`` (seed of the random choice), ``compensated, loss`` (relative
        to ``tr(W H Wᵀ)``, that of removing everything).
    """
    rows, solver = [], Solver()
    for site, problem in problems.items():
        W, H, total = problem.W, problem.H, len(problem.unit_columns)
        H_damped, _ = damped_inverse(H, solver.damping, solver.damping_mode)
        for remove in sorted({round(ratio * total) for ratio in ratios} - {0, total}):
            facts = {"site": site, "units": total, "leave": remove, "share": remove / total}
            choices = [("SlimGPT", 0, solve(problem, remove, solver).kept)]
            for draw in range(3):
                order = torch.randperm(total, generator=torch.Generator().manual_seed(draw))
                choices.append(("random", draw, order[remove:].sort().values.tolist()))
            for choice, draw, kept in choices:
                columns = problem.columns(kept)
                for compensated in (True, False):
                    W_kept = refit(W, H_damped, columns) if compensated else W[:, columns]
                    loss = reconstruction_loss(W, H, W_kept, columns) / quadratic_form(W, H)
                    row = {"choice": choice, "draw": draw, "compensated": compensated, "loss": loss}
                    rows.append(facts | row)
    return pd.DataFrame(rows)
