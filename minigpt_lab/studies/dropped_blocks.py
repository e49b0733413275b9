"""Whole blocks dropped, beside all layers narrowed to the same size or the same speed."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..checks import DictOf, Instance, InvalidArgument, Number, checked
from ..compensation import linear_compensated, slimgpt
from ..domains import Part
from ..evaluation import efficiency
from ..models import shrink
from ..planning import plan_dropping
from .arguments import BATCHES, PAIR, PROTOCOL, TEXTS
from .held_out import HeldOut

_SPEEDS = ["prefill_speedup", "decode_speedup"]
_MOST = 0.9  # of the units: how far narrowing goes for a speed
_UNFITTED = {"compensate": False, "progress": False}


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
        general text; narrowed until they decode about as fast. The third and the last are left
        out, with a warning, where no map fits and where no width has that speed. Columns
        ``variant, prefill_speedup, decode_speedup`` (measured in turns with the dense model),
        ``stored, removed``, and those of `divergence`.
    """
    plan = plan_dropping(model, influence, ratio=ratio)
    variants = {"dense": model, "dropped": shrink(model, plan)}
    size = {"parameters": variants["dropped"].num_parameters(), "progress": False}
    try:
        mapped = linear_compensated(model, plan, batches, progress=False)
    except InvalidArgument as error:
        warnings.warn(f"no map in place of the dropped blocks: {error}", stacklevel=2)
    else:
        variants["dropped, with a map"] = shrink(mapped, plan)
    variants["narrowed"], _ = slimgpt(model, batches, **size)
    variants["narrowed, μ 0.5"], _ = slimgpt(
        model, batches, general=general, generality=0.5, **size
    )

    def speedups(variant: PreTrainedModel) -> dict[str, float]:
        found = efficiency(variant, tokenizer, dense=model, seq_len=seq_len, repeats=3)
        return found.iloc[-1][_SPEEDS].astype(float).to_dict()

    speeds = {name: speedups(variant) for name, variant in variants.items()}
    # Speed depends on widths alone: models of several are pruned on one window, not compensated.
    window, widths = [*batches][:1], {}
    for share in np.linspace(ratio, max(ratio, _MOST), 4):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that one window is few tokens
            mini, _ = slimgpt(model, window, ratio=float(share), **_UNFITTED)
        widths[share] = speedups(mini)["decode_speedup"]
    share = as_fast(widths, speeds["dropped"]["decode_speedup"])
    if share is None:
        warnings.warn(
            "no narrowed model decodes as fast as the one with dropped blocks, within the noise of "
            "this machine: its row is left out",
            stacklevel=2,
        )
    else:
        fast, _ = slimgpt(model, batches, ratio=share, progress=False)
        variants["narrowed, as fast"], speeds["narrowed, as fast"] = fast, speedups(fast)
    held_out = HeldOut(model, tokenizer, texts, max_tokens=max_tokens, seq_len=seq_len, path=None)
    rows = []
    for name, variant in variants.items():
        rows += held_out.table_rows(held_out.measure(variant), variant=name, **speeds[name])
    return pd.DataFrame(rows)


@checked(speeds=DictOf(Number(0, 1), Number(0)), wanted=Number(0))
def as_fast(speeds: Mapping[float, float], wanted: float) -> float | None:
    """Share to remove for a speed-up, between those that were measured; None if it is outside.

    Parameters
    ----------
    speeds : mapping
        Share that is removed to the speed-up. Shares that are no faster than a smaller one say
        nothing.
    wanted : float
        The speed-up.
    """
    shares, faster = [0.0], [1.0]
    for share, speed in sorted(speeds.items()):
        if speed > faster[-1]:
            shares.append(share)
            faster.append(speed)
    if not faster[0] < wanted <= faster[-1]:
        return None
    return float(np.interp(wanted, faster, shares))
