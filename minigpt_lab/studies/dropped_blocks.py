"""Whole blocks dropped, beside all layers narrowed to the same size or the same speed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..checks import Instance, Number, checked
from ..compensation import linear_compensated, slimgpt
from ..criteria import score
from ..domains import Part
from ..evaluation import efficiency
from ..models import shrink
from ..planning import plan_dropping, plan_from_scores
from .arguments import BATCHES, PAIR, PROTOCOL, TEXTS
from .held_out import HeldOut

_SPEEDS = ["prefill_speedup", "decode_speedup"]
_MOST = 0.9  # of the units: how far narrowing goes for a speed


@checked(
    **PAIR,
    **PROTOCOL,
    batches=BATCHES,
    general=BATCHES,
    texts=TEXTS,
    influence=Instance(pd.DataFrame, "lab.block_influence gives it"),
    ratio=Number(above=0, below=1),
)
def dropped_or_narrowed(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batches: Sequence[dict],
    *,
    general: Sequence[dict],
    texts: Sequence[Part],
    influence: pd.DataFrame,
    ratio: float,
    max_tokens: int = 8_192,
    seq_len: int = 256,
) -> pd.DataFrame:
    """Drop blocks by influence, narrow all layers by `slimgpt`, measure loss and speed.

    Parameters
    ----------
    model, tokenizer
        The dense pair; not changed.
    batches, general : sequence of dict
        Calibration tokens of the domain, and of general text.
    texts : sequence of Part
        Held out.
    influence : pandas.DataFrame
        From `block_influence`, with the blocks that may be dropped.
    ratio : float
        Share of the decoder layers' parameters to drop.
    max_tokens, seq_len : int
        Tokens per text, and per window (no overlap).

    Returns
    -------
    pandas.DataFrame
        A row per variant and text: dense; dropped; dropped with a map in their place
        (`linear_compensated`); narrowed to that size, on the domain's text alone and with half
        general text; narrowed until they decode about as fast. Columns ``variant, prefill_speedup,
        decode_speedup`` (measured in turns with the dense model), ``stored, removed``, and those of
        `divergence`.
    """
    plan = plan_dropping(model, influence, ratio=ratio)
    variants = {"dense": model, "dropped": shrink(model, plan)}
    size = {"parameters": variants["dropped"].num_parameters(), "progress": False}
    mapped = linear_compensated(model, plan, batches, progress=False)
    variants["dropped, with a map"] = shrink(mapped, plan)
    variants["narrowed"], _ = slimgpt(model, batches, **size)
    variants["narrowed, μ 0.5"], _ = slimgpt(
        model, batches, general=general, generality=0.5, **size
    )

    def speedups(variant: PreTrainedModel) -> pd.Series:
        found = efficiency(variant, tokenizer, dense=model, seq_len=seq_len, repeats=3)
        return found.iloc[-1][_SPEEDS].astype(float).round(2)

    def narrowed_speed(share: float) -> float:
        cut = plan_from_scores(model, scores, ratio=share)
        return speedups(shrink(model, cut))["decode_speedup"]

    # Speed depends on widths alone: at four of them, units are chosen by magnitude.
    scores = score(model, "magnitude")
    shares = np.linspace(ratio, max(ratio, _MOST), 4)
    speeds = np.maximum.accumulate([1.0, *map(narrowed_speed, shares)])
    dropped = speedups(variants["dropped"])["decode_speedup"]
    share = np.interp(dropped, speeds, [0.0, *shares])
    fast = {"ratio": float(share), "progress": False}
    variants["narrowed, as fast"], _ = slimgpt(model, batches, **fast)
    held_out = HeldOut(model, tokenizer, texts, max_tokens=max_tokens, seq_len=seq_len, path=None)
    rows = []
    for name, variant in variants.items():
        speed = speedups(variant).to_dict()
        rows += held_out.table_rows(held_out.measure(variant), variant=name, **speed)
    return pd.DataFrame(rows)
