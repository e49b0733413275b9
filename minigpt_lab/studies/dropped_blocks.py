"""Whole blocks dropped, beside all layers narrowed to the same size or the same speed."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..calibration import tokens_hash
from ..checks import DictOf, Instance, InvalidArgument, Number, checked
from ..compensation import linear_compensated, slimgpt
from ..domains import Part
from ..evaluation import efficiency
from ..models import shrink
from ..planning import plan_dropping
from .arguments import BATCHES, FOLDER, PAIR, PROTOCOL, TEXTS
from .held_out import HeldOut

_SPEEDS = ["prefill_speedup", "decode_speedup"]
_MOST = 0.9  # of the units: how far narrowing goes for a speed
_NOISE = 0.15  # relative difference of two speeds that are called the same
_UNFITTED = {"compensate": False, "progress": False}


@checked(
    **PAIR,
    **PROTOCOL,
    batches=BATCHES,
    general=BATCHES,
    texts=TEXTS,
    influence=Instance(pd.DataFrame, "lab.block_influence gives it"),
    ratio=Number(above=0, below=1),
    out_dir=FOLDER,
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
    out_dir: str | os.PathLike | None = None,
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
    out_dir : str or path, optional
        Folder in which finished variants are kept: an interrupted study continues.

    Returns
    -------
    pandas.DataFrame
        A row per variant and text: dense; dropped; dropped with a map in their place
        (`linear_compensated`); narrowed to that size, on the domain's text alone and with half
        general text; narrowed until they decode about as fast. The third and the last are left
        out, with a warning, where no map fits and where no width has that speed (within 15 %).
        Columns ``variant, prefill_speedup, decode_speedup`` (measured in turns with the dense
        model), ``stored, removed``, and those of `divergence`.
    """
    path = out_dir and Path(out_dir) / "variants.json"
    held_out = HeldOut(model, tokenizer, texts, max_tokens=max_tokens, seq_len=seq_len, path=path)
    plan = plan_dropping(model, influence, ratio=ratio)
    size = {"parameters": plan.predicted_size(model).stored}
    facts = [plan.removed, ratio, tokens_hash(batches), tokens_hash(general)]

    def narrowed(**options) -> PreTrainedModel:
        return slimgpt(model, batches, progress=False, **options)[0]

    def mapped() -> PreTrainedModel:
        return shrink(linear_compensated(model, plan, batches, progress=False), plan)

    def speedups(variant: PreTrainedModel) -> dict[str, float]:
        found = efficiency(variant, tokenizer, dense=model, seq_len=seq_len, repeats=3)
        return found.iloc[-1][_SPEEDS].astype(float).to_dict()

    def result(name: str, make: Callable[[], PreTrainedModel], *more: object) -> dict:
        def compute() -> dict:
            variant = make()
            return {**held_out.measure(variant), "speeds": speedups(variant)}

        return held_out.get(["dropped or narrowed", name, facts, *more], compute)

    results = {"dense": result("dense", lambda: model)}
    results["dropped"] = result("dropped", lambda: shrink(model, plan))
    try:
        results["dropped, with a map"] = result("dropped, with a map", mapped)
    except InvalidArgument as error:
        warnings.warn(f"no map in place of the dropped blocks: {error}", stacklevel=2)
    results["narrowed"] = result("narrowed", partial(narrowed, **size))
    half = partial(narrowed, **size, general=general, generality=0.5)
    results["narrowed, μ 0.5"] = result("narrowed, μ 0.5", half)

    # Speed depends on widths alone: models of several are pruned on one window, not compensated.
    def speeds_of_widths() -> dict:
        window, speeds = [*batches][:1], []
        for share in np.linspace(ratio, max(ratio, _MOST), 4).tolist():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that one window is few tokens
                mini, _ = slimgpt(model, window, ratio=share, **_UNFITTED)
            speeds.append([share, speedups(mini)["decode_speedup"]])
        return {"speeds": speeds}

    widths = held_out.get(["speeds of widths", facts], speeds_of_widths)["speeds"]
    wanted = results["dropped"]["speeds"]["decode_speedup"]
    share = as_fast(dict(widths), wanted)
    if share is not None:
        fast = result("narrowed, as fast", partial(narrowed, ratio=share), share)
        if abs(fast["speeds"]["decode_speedup"] / wanted - 1) <= _NOISE:
            results["narrowed, as fast"] = fast
    if "narrowed, as fast" not in results:
        warnings.warn(
            "no narrowed model decodes as fast as the one with dropped blocks, within the noise of "
            "this machine: its row is left out",
            stacklevel=2,
        )
    rows = []
    for name, found in results.items():
        rows += held_out.table_rows(found, variant=name, **found["speeds"])
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
