"""Ablations of SlimGPT on one model and the same text."""

from __future__ import annotations

import inspect
import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..checks import DictOf, Instance, Integer, ListOf, Model, Text, checked
from ..compensation import Solver, slimgpt
from ..domains import Part, tokenize, unpadded
from ..evaluation import generate, timed
from ..models import Anatomy, PruningPlan, fingerprint, inference
from ..store import ResultCache, cache_key
from .arguments import BATCHES, FOLDER, PAIR, PART, PROTOCOL, SHARES, TEXTS
from .held_out import HeldOut
from .prunings import plain_options

#: SlimGPT's dense model: perplexity of LLaMA-7B on WikiText2 in windows of 128.
PUBLISHED_DENSE = 12.63
#: Its table 6, same protocol: pruned by 50 %, not fine-tuned, calibrated on 256 windows of C4 of
#: 2,048 tokens; 3.34 to 3.5 billion parameters are kept.
PUBLISHED_ALLOCATIONS = {
    "log-increase": 38.83,
    "linear-increase": 46.57,
    "uniform": 123.05,
    "log-decrease": 380.69,
    "linear-decrease": 932.64,
}
#: Its figure 2, same protocol: share removed from layer 0 alone, to perplexity.
PUBLISHED_FIRST_LAYER = {0.25: 12.64, 0.5: 13.98, 0.75: 21.49}

_DEFAULTS = asdict(Solver()) | {
    name: parameter.default for name, parameter in inspect.signature(slimgpt).parameters.items()
}


@checked(
    **PAIR,
    **PROTOCOL,
    variants=DictOf(Text(), Instance(Mapping), 1),
    batches=BATCHES,
    texts=TEXTS,
    prompt=Text(),
    out_dir=FOLDER,
)
def slimgpt_variants(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    variants: Mapping[str, Mapping[str, object]],
    *,
    batches: Sequence[dict],
    texts: Sequence[Part],
    max_tokens: int = 1_024,
    seq_len: int = 256,
    prompt: str = "",
    out_dir: str | os.PathLike | None = None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Run SlimGPT several ways and measure each on held-out text, beside the dense model.

    Parameters
    ----------
    model, tokenizer
        The dense pair; not changed.
    variants : mapping
        Name to the arguments of `slimgpt`, as plain data. ``batches`` among them are a variant's
        own calibration tokens.
    batches : sequence of dict
        Calibration tokens of all others.
    texts : sequence of Part
        Held out.
    max_tokens, seq_len : int
        Tokens per text, and per window (no overlap).
    prompt : str
        What every variant continues by twenty tokens, greedily; nothing by default.
    out_dir : str or path, optional
        Folder in which finished variants are kept, whatever they are called: an interrupted study
        continues, and two studies share what they have in common.

    Returns
    -------
    pandas.DataFrame
        A row per variant and text, dense first: ``variant, compensated, stored, removed`` (share of
        the model), ``perplexity_ratio`` (to dense), ``continuation``, and those of
        `Perplexity.row`.
    pandas.DataFrame
        A row per variant, site and layer: ``variant, site, layer, units, kept, removed, cost``
        (parameters of a unit) and ``error`` of the projection, relative to its output.
    """
    if "dense" in variants or {"inplace", "out_dir", "progress"} & set().union(*variants.values()):
        raise ValueError("a study names 'dense' and sets inplace, out_dir, progress by itself")
    path = out_dir and Path(out_dir) / "variants.json"
    held_out = HeldOut(model, tokenizer, texts, max_tokens=max_tokens, seq_len=seq_len, path=path)

    def measured(options: dict | None, folder: Path) -> dict:
        pruned, layers = model, []
        if options is not None:
            search = options.get("allocation") == "search"  # the one that is long enough to resume
            own = {"out_dir": folder if search and out_dir else None, "progress": search}
            pruned, plan = slimgpt(model, **options, **own)
            layers = _layer_rows(model, plan)
        text = prompt and generate(pruned, tokenizer, prompt, max_new_tokens=20)
        return {**held_out.measure(pruned), "continuation": text, "layers": layers}

    rows, layers = [], []
    for name, given in tqdm({"dense": None, **variants}.items(), desc="SlimGPT", unit="variant"):
        options = None if given is None else {"batches": batches, **given}
        key = [prompt, options and _settings(options)]
        folder = Path(out_dir or "") / f"search-{cache_key([held_out.facts, key])[:8]}"
        result = held_out.get(key, partial(measured, options, folder))
        facts = {"variant": name, "compensated": (given or {}).get("compensate", True)}
        rows += held_out.table_rows(result, **facts, continuation=result["continuation"])
        layers += [{"variant": name, **row} for row in result["layers"]]
    table = pd.DataFrame(rows)
    table.insert(4, "perplexity_ratio", table["perplexity"] / _dense_levels(table))
    return table, pd.DataFrame(layers)


def _settings(options: Mapping[str, Any]) -> dict[str, Any]:
    """What a variant's result depends on: its tokens, and options that are not the default."""
    changed = {k: v for k, v in options.items() if k not in _DEFAULTS or v != _DEFAULTS[k]}
    return plain_options(changed)


def _layer_rows(model: PreTrainedModel, plan: PruningPlan) -> list[dict]:
    """Rows of the table of layers, as plain data."""
    anatomy, rows = Anatomy(model), plan.to_frame().to_dict("records")
    for row in rows:
        site, layer = row["site"], row["layer"]
        row["cost"] = anatomy.unit_parameters(site, layer)
        row["error"] = plan.origin["error"][site][layer]
    return rows


def _dense_levels(table: pd.DataFrame) -> pd.Series:
    """The dense model's perplexity on the text of each row."""
    dense = table[table["variant"] == "dense"].set_index("text")["perplexity"]
    return table["text"].map(dense)


@checked(**PAIR, batches=BATCHES, texts=TEXTS, places=SHARES, ratios=SHARES)
def one_layer_at_a_time(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batches: Sequence[dict],
    *,
    texts: Sequence[Part],
    places: Sequence[float],
    ratios: Sequence[float],
    **measuring,
) -> pd.DataFrame:
    """Prune a single layer at a time, by its depth and by how much is removed.

    Parameters
    ----------
    model, tokenizer, batches, texts
        As for `slimgpt_variants`.
    places : sequence of float
        Which layers: 0 is the first, 1 the last.
    ratios : sequence of float
        Shares of the layer's heads and channels.
    **measuring
        Of `slimgpt_variants`: ``max_tokens, seq_len, out_dir``.

    Returns
    -------
    pandas.DataFrame
        That of `slimgpt_variants` without the dense model, with ``layer`` and ``ratio``.
    """
    last = len(Anatomy(model).layers) - 1
    cells, variants = [], {}
    for layer, ratio in itertools.product(sorted({round(p * last) for p in places}), ratios):
        name = f"layer {layer}, {ratio:.0%}"
        cells.append({"variant": name, "layer": layer, "ratio": ratio})
        keep_layers = [layer, last - layer]
        variants[name] = {"ratio": ratio, "allocation": "uniform", "keep_layers": keep_layers}
    table, _ = slimgpt_variants(
        model, tokenizer, variants, batches=batches, texts=texts, **measuring
    )
    return pd.DataFrame(cells).merge(table, on="variant")


@checked(
    **PAIR,
    source=PART,
    texts=TEXTS,
    options=DictOf(Text()),
    tokens=ListOf(Integer(2), 1),
    lengths=ListOf(Integer(2), 1),
    total=Integer(2),
    seq_len=Integer(2),
)
def calibration_amounts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    source: Part,
    *,
    texts: Sequence[Part],
    options: Mapping[str, object],
    tokens: Sequence[int],
    lengths: Sequence[int],
    total: int,
    seq_len: int = 256,
    **measuring,
) -> pd.DataFrame:
    """Vary the amount of calibration text, and the length of its windows at one amount.

    Parameters
    ----------
    model, tokenizer, texts
        As for `slimgpt_variants`.
    source : Part
        The calibration text.
    options : mapping
        Of `slimgpt`.
    tokens : sequence of int
        Amounts, in windows of `seq_len`.
    lengths : sequence of int
        Of windows that hold `total` tokens together.
    total : int
        See `lengths`: what varies is how much a token can look back on, not how much text there is.
    seq_len : int
        Also of the test windows.
    **measuring
        Of `slimgpt_variants`.

    Returns
    -------
    pandas.DataFrame
        That of `slimgpt_variants` without the dense model, with ``setting`` (what varies),
        ``value`` and ``dense`` (the dense model's perplexity). A text that is too short gives fewer
        tokens; ``value`` is how many there were.
    """
    shapes = [("calibration tokens", seq_len, n) for n in tokens]
    shapes += [(f"tokens per window, {total:,} in all", n, total) for n in lengths]
    cells, variants = [], {}
    for setting, length, amount in shapes:
        batches = tokenize(source, tokenizer, seq_len=length, max_tokens=amount)
        held = sum(batch["input_ids"].numel() for batch in batches)
        value = held if setting == shapes[0][0] else length
        name = f"{held:,} tokens in windows of {length:,}"
        cells.append({"variant": name, "setting": setting, "value": value})
        variants[name] = {**options, "batches": batches}
    table, _ = slimgpt_variants(
        model, tokenizer, variants, batches=batches, texts=texts, seq_len=seq_len, **measuring
    )
    return pd.DataFrame(cells).merge(table.assign(dense=_dense_levels(table)), on="variant")


@checked(model=Model(), calibrations=ListOf(BATCHES, 1), repeats=Integer(1), out_dir=FOLDER)
def slimgpt_timing(
    model: PreTrainedModel,
    calibrations: Sequence[Sequence[dict]],
    *,
    repeats: int = 3,
    out_dir: str | os.PathLike | None = None,
    **options,
) -> pd.DataFrame:
    """Seconds that SlimGPT takes, beside those of a plain pass over the same tokens.

    The plain pass is the decoder without its head, as SlimGPT asks for no logits. Both are timed in
    turns, so that a drifting machine slows both alike.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A supported causal language model.
    calibrations : sequence of batches
        Calibration tokens, e.g. several amounts.
    repeats : int
        Timed rounds, after a plain pass that is not.
    out_dir : str or path, optional
        Folder in which finished rows are kept.
    **options
        Of `slimgpt`: ``ratio, sites, …``.

    Returns
    -------
    pandas.DataFrame
        A row per calibration: ``tokens, forward_seconds, slimgpt_seconds`` (medians),
        ``passes`` (SlimGPT over the plain pass, median of the rounds), ``min, max`` (the extremes
        of it), ``repeats, device``.
    """

    def forward(batches) -> None:
        with inference(model):
            for ids in unpadded(batches):
                model.base_model(input_ids=ids.to(model.device), use_cache=False)

    def measured(batches) -> dict:
        runs = {
            "forward_seconds": lambda: forward(batches),
            "slimgpt_seconds": lambda: slimgpt(model, batches, **options, progress=False),
        }
        forward(batches)  # warms caches and kernels up
        seconds = pd.DataFrame(
            {name: timed(model.device, run)[0] for name, run in runs.items()}
            for _ in range(repeats)
        )
        passes = seconds["slimgpt_seconds"] / seconds["forward_seconds"]
        return {
            "tokens": sum(batch["input_ids"].numel() for batch in batches),
            **seconds.median(),
            "passes": passes.median(),
            "min": passes.min(),
            "max": passes.max(),
            "repeats": repeats,
            "device": str(model.device),
        }

    cache = ResultCache(out_dir and Path(out_dir) / "timing.json")
    facts = [fingerprint(model), str(model.device), repeats]  # the hash is kept from now on
    rows = []
    for batches in tqdm(calibrations, desc="timing", unit="calibration"):
        key = [*facts, _settings({"batches": batches, **options})]
        rows.append(cache.get(key, partial(measured, batches)))
    return pd.DataFrame(rows)
