"""Whole blocks dropped, beside all layers narrowed to the same number of parameters."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..checks import Instance, Number, checked
from ..compensation import slimgpt
from ..domains import Part
from ..evaluation import efficiency
from ..models import shrink
from ..planning import plan_dropping
from .arguments import BATCHES, PAIR, PROTOCOL, TEXTS
from .held_out import HeldOut

_SPEEDS = ["prefill_speedup", "decode_speedup"]


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
    """Drop blocks by influence, narrow all layers to the same size by `slimgpt`, measure both.

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
        A row per variant and text: dense, dropped, narrowed on the domain's text alone, narrowed
        with half general text. Columns ``variant, prefill_speedup, decode_speedup`` (measured in
        turns with the dense model), ``stored, removed``, and those of `divergence`.
    """
    dropped = shrink(model, plan_dropping(model, influence, ratio=ratio))
    size = {"parameters": dropped.num_parameters(), "progress": False}
    narrowed, _ = slimgpt(model, batches, **size)
    mixed, _ = slimgpt(model, batches, general=general, generality=0.5, **size)
    variants = {"dense": model, "dropped": dropped, "narrowed": narrowed, "narrowed, μ 0.5": mixed}
    held_out = HeldOut(model, tokenizer, texts, max_tokens=max_tokens, seq_len=seq_len, path=None)
    rows = []
    for name, variant in variants.items():
        speed = efficiency(variant, tokenizer, dense=model, seq_len=seq_len, repeats=3).iloc[-1]
        faster = speed[_SPEEDS].astype(float).round(2).to_dict()
        rows += held_out.table_rows(held_out.measure(variant), variant=name, **faster)
    return pd.DataFrame(rows)
