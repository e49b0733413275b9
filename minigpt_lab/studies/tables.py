"""Tables about one model: its parameters, its speed, the quality of SPSA gradients."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import pandas as pd
import torch
from transformers import PreTrainedModel

from ..calibration import collect_gradients, estimate_gradients, scored_weights
from ..checks import Batches, Integer, ListOf, Model, OneOf, Text, checked
from ..models import SITES, Anatomy


@checked(model=Model(), variant=Text())
def parameter_budget(model: PreTrainedModel, variant: str) -> pd.DataFrame:
    """Where a model's stored parameters are: ``variant, part, parameters``."""
    anatomy = Anatomy(model)
    counts = {
        part: sum(
            n * anatomy.unit_parameters(part, layer) for layer, n in enumerate(anatomy.units(part))
        )
        for part in ("attention", "ffn")
    }
    heads = (model.get_input_embeddings(), model.get_output_embeddings())
    tables = {id(head.weight): head.weight.numel() for head in heads if head is not None}
    counts["embeddings"] = sum(tables.values())  # a tied head counts once
    counts["other"] = sum(p.numel() for p in model.parameters()) - sum(counts.values())
    return pd.DataFrame(
        [{"variant": variant, "part": part, "parameters": n} for part, n in counts.items()]
    )


def throughput_rates(table: pd.DataFrame) -> pd.DataFrame:
    """Rows of `efficiency`, one per model and kind of work, as `figures.throughput` draws them.

    Returns
    -------
    pandas.DataFrame
        Columns ``variant, stored, kind`` (prefill, decode), ``tokens_per_second`` (median) and
        ``low, high`` (slowest and fastest round), ``batch, device, runs``.
    """
    facts = table.rename(columns={"batch_size": "batch", "repeats": "runs"})
    facts = facts[["variant", "stored", "batch", "device", "runs"]]
    parts = []
    for kind in ("prefill", "decode"):
        rate = table[f"{kind}_tokens_per_second"]
        tokens = rate * table[f"{kind}_seconds"]
        low, high = tokens / table[f"{kind}_high"], tokens / table[f"{kind}_low"]
        parts.append(facts.assign(kind=kind, tokens_per_second=rate, low=low, high=high))
    return pd.concat(parts, ignore_index=True)


@checked(
    model=Model(),
    batches=Batches(),
    directions=ListOf(Integer(1), 1),
    seeds=Integer(1),
    sites=ListOf(OneOf(SITES), 1),
)
def cosine_curve(
    model: PreTrainedModel,
    batches: Iterable[dict[str, torch.Tensor]],
    directions: Iterable[int],
    *,
    seeds: int = 3,
    sites: tuple[str, ...] = SITES,
) -> pd.DataFrame:
    """Cosine of estimates to the true gradient, which is computed once.

    Parameters
    ----------
    model, batches, sites
        As for `gradient_cosine`.
    directions : iterable of int
        Numbers of directions to try, per window.
    seeds : int
        Estimates of each.

    Returns
    -------
    pandas.DataFrame
        Columns ``directions`` (in all windows together), ``seed, cosine``, and ``expected``: the
        root of directions over weights.
    """
    batches, names = list(batches), scored_weights(model, sites)
    truth = collect_gradients(model, batches, names)
    weights = sum(model.get_submodule(name).weight.numel() for name in names)
    rows = []
    for n, seed in itertools.product(directions, range(seeds)):
        found = estimate_gradients(model, batches, names, n_directions=n, seed=seed)
        tried = len(found.coefficients)
        rows.append([tried, seed, found.cosine(truth), (tried / weights) ** 0.5])
    return pd.DataFrame(rows, columns=["directions", "seed", "cosine", "expected"])
