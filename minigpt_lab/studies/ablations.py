"""SlimGPT taken apart: what each of its choices is worth on one model and the same text."""

from __future__ import annotations

import inspect
import json
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..calibration import LayerRunner, catch_inputs, damped_inverse, refit, tokens_hash
from ..checks import DictOf, Instance, Integer, ListOf, Model, Text, checked
from ..compensation import (
    Problem,
    Solver,
    full_precision,
    quadratic_form,
    read_problem,
    reconstruction_loss,
    slimgpt,
    solve,
)
from ..domains import Part, excerpt, tokenize, unpadded
from ..evaluation import generate, perplexity, timed
from ..models import Anatomy, PruningPlan, fingerprint, inference, model_size
from ..store import ResultCache, Shards, cache_key, content_hash
from .arguments import BATCHES, FOLDER, PAIR, PART, PROTOCOL, SHARES, TEXTS

#: SlimGPT's dense model: perplexity of LLaMA-7B on WikiText2 in windows of 128.
PUBLISHED_DENSE = 12.63
#: Its table 6, same protocol: cut by 50 %, not fine-tuned, calibrated on 256 windows of C4 of 2,048
#: tokens; 3.34 to 3.5 billion parameters are left.
PUBLISHED_SCHEDULES = {
    "log-increase": 38.83, "linear-increase": 46.57, "uniform": 123.05,
    "log-decrease": 380.69, "linear-decrease": 932.64,
}  # fmt: skip
#: Its figure 2, same protocol: share of layer 0 alone that leaves, to perplexity.
PUBLISHED_FIRST_LAYER = {0.25: 12.64, 0.5: 13.98, 0.75: 21.49}

_DEFAULTS = asdict(Solver()) | {
    name: parameter.default for name, parameter in inspect.signature(slimgpt).parameters.items()
}


@checked(
    **PAIR, **PROTOCOL, variants=DictOf(Text(), Instance(Mapping), 1), batches=BATCHES, texts=TEXTS,
    prompt=Text(), new_tokens=Integer(1), out_dir=FOLDER,
)  # fmt: skip
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
    new_tokens: int = 20,
    out_dir: str | os.PathLike | None = None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Run SlimGPT several ways and measure each on held-out text, beside the dense model.

    Parameters
    ----------
    model, tokenizer
        The dense pair; left as it is.
    variants : mapping
        Name to the arguments of `slimgpt`, as plain data. ``batches`` among them are a variant's
        own calibration tokens.
    batches : sequence of dict
        Calibration tokens of all others.
    texts : sequence of Part
        Held out.
    max_tokens, seq_len : int
        Tokens per text, and per window (no overlap).
    prompt, new_tokens : str, int
        What every variant continues, greedily, and how far; nothing is generated if it is empty.
    out_dir : str or path, optional
        Folder in which finished variants are kept, whatever they are called: an interrupted study
        goes on where it stopped, and two studies share what they have in common.

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
    ledger = ResultCache(out_dir and Path(out_dir) / "variants.jsonl")
    read = [excerpt(text, tokenizer, max_tokens=max_tokens) for text in texts]
    protocol = {"seq_len": seq_len, "max_characters": None}
    recipe = [fingerprint(model), [*map(content_hash, read)], protocol, prompt, new_tokens]

    def measured(options: dict | None, key: dict | None) -> dict:
        mini, plan = model, None
        if options is not None:
            long = options.get("allocation") == "search"
            name = cache_key([*recipe, key])
            kept = Path(out_dir) / f"search-{name[:8]}" if long and out_dir else None
            mini, plan = slimgpt(model, **options, out_dir=kept, progress=long)
        return {
            "stored": model_size(mini).stored,
            "rows": [
                perplexity(mini, tokenizer, text, progress=False, **protocol).row() for text in read
            ],
            "continuation": prompt and generate(mini, tokenizer, prompt, max_new_tokens=new_tokens),
            "layers": [] if plan is None else _budget(model, plan),
        }

    rows, layers, dense = [], [], model_size(model).stored
    for name, given in tqdm({"dense": None, **variants}.items(), desc="SlimGPT", unit="variant"):
        options = None if given is None else {"batches": batches, **given}
        key = None if options is None else _settings(options)
        found = ledger.get([*recipe, key], lambda given=(options, key): measured(*given))
        facts = {"variant": name, "compensated": (given or {}).get("compensate", True)}
        facts |= {"stored": found["stored"], "removed": 1 - found["stored"] / dense}
        facts |= {"continuation": found["continuation"]}
        rows += [{**facts, **row} for row in found["rows"]]
        layers += [{"variant": name, **row} for row in found["layers"]]
    table = pd.DataFrame(rows)
    level = table["text"].map(table[: len(read)].set_index("text")["perplexity"])
    table.insert(4, "perplexity_ratio", table["perplexity"] / level)
    return table, pd.DataFrame(layers)


def _settings(options: Mapping[str, object]) -> dict[str, object]:
    """What a variant's result depends on: its tokens, options not the default, all of a search."""
    apart = {k: v for k, v in options.items() if k not in _DEFAULTS or v != _DEFAULTS[k]}
    return apart | {"batches": tokens_hash(options["batches"])}


def _budget(model: PreTrainedModel, plan: PruningPlan) -> list[dict]:
    frame, anatomy, errors = plan.to_frame(), Anatomy(model), plan.origin["error"]
    places = list(zip(frame["site"], frame["layer"], strict=True))
    frame["cost"] = [anatomy.unit_parameters(*place) for place in places]
    frame["error"] = [errors[site][layer] for site, layer in places]
    return json.loads(frame.to_json(orient="records", double_precision=15))


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
    cells = {
        f"layer {layer}, {ratio:.0%}": {"layer": layer, "ratio": ratio}
        for layer in sorted({round(place * last) for place in places})
        for ratio in ratios
    }
    variants = {
        name: {"ratio": cell["ratio"], "allocation": "uniform",
               "keep_layers": [cell["layer"], last - cell["layer"]]}
        for name, cell in cells.items()
    }  # fmt: skip
    table, _ = slimgpt_variants(
        model, tokenizer, variants, batches=batches, texts=texts, **measuring
    )
    facts = pd.DataFrame.from_dict(cells, orient="index").rename_axis("variant").reset_index()
    return facts.merge(table, on="variant")


@checked(
    **PAIR, source=PART, texts=TEXTS, options=DictOf(Text()), tokens=ListOf(Integer(2), 1),
    lengths=ListOf(Integer(2), 1), total=Integer(2), seq_len=Integer(2),
)  # fmt: skip
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
    """What more calibration text is worth, and what longer windows of the same text are.

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
        found = tokenize(source, tokenizer, seq_len=length, max_tokens=amount)
        held = sum(batch["input_ids"].numel() for batch in found)
        value = held if setting == shapes[0][0] else length
        name = f"{held:,} tokens in windows of {length:,}"
        cells.append({"variant": name, "setting": setting, "value": value})
        variants[name] = {**options, "batches": found}
    table, _ = slimgpt_variants(
        model, tokenizer, variants, batches=found, texts=texts, seq_len=seq_len, **measuring
    )
    dense = table[table["variant"] == "dense"].set_index("text")["perplexity"]
    return pd.DataFrame(cells).merge(table.assign(dense=table["text"].map(dense)), on="variant")


@checked(model=Model(), batches=BATCHES, layer=Integer(0))
def layer_problems(
    model: PreTrainedModel, batches: Sequence[dict], *, layer: int, **solver
) -> dict[str, Problem]:
    """What the two projections that read units (o, down) read in one layer of the dense model.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A supported causal language model; left as it is.
    batches : sequence of dict
        Calibration tokens.
    layer : int
        Which layer.
    **solver
        Fields of `Solver`.
    """
    anatomy, hidden, options = Anatomy(model), Shards(), Solver(**solver)
    with inference(model), full_precision():
        calls = catch_inputs(model, batches, hidden)
        for index in range(layer):
            LayerRunner(anatomy, index, hidden, calls).finish()
        one = LayerRunner(anatomy, layer, hidden, calls)
        return {
            site: read_problem(anatomy, one, layer, site, options)
            for site in ("attention", "ffn")  # in the order of the data flow
        }


@checked(
    problems=DictOf(Text(), Instance(Problem), 1), ratios=SHARES, n_random=Integer(1),
    seed=Integer(0),
)  # fmt: skip
def layer_losses(
    problems: Mapping[str, Problem], ratios: Sequence[float], *, n_random: int = 3, seed: int = 0
) -> pd.DataFrame:
    """Loss of one layer's projections: units chosen or drawn, the rest refitted or as it was.

    Parameters
    ----------
    problems : mapping
        From `layer_problems`.
    ratios : sequence of float
        Shares of units that leave, rounded to whole units.
    n_random, seed : int
        Random choices for each, and the seed of the first.

    Returns
    -------
    pandas.DataFrame
        Columns ``site, units, leave, share, choice`` (SlimGPT, random), ``draw, compensated, loss``
        (relative to ``tr(W H Wᵀ)``, that of removing everything).
    """
    rows, options = [], Solver()
    for site, given in problems.items():
        total, scale = len(given.units), quadratic_form(given.W, given.H)
        damped, _ = damped_inverse(given.H, options.damping, options.damping_mode)
        for leave in sorted({round(ratio * total) for ratio in ratios} - {0, total}):
            chosen = {("SlimGPT", 0): solve(given, leave, options).kept}
            for draw in range(n_random):
                order = torch.randperm(total, generator=torch.Generator().manual_seed(seed + draw))
                chosen["random", draw] = order[leave:].sort().values.tolist()
            for (choice, draw), kept in chosen.items():
                columns = given.columns(kept)
                ways = {True: refit(given.W, damped, columns), False: given.W[:, columns]}
                facts = {"site": site, "units": total, "leave": leave, "share": leave / total}
                rows += [
                    {**facts, "choice": choice, "draw": draw, "compensated": refitted,
                     "loss": reconstruction_loss(given.W, given.H, W, columns) / scale}
                    for refitted, W in ways.items()
                ]  # fmt: skip
    return pd.DataFrame(rows)


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
        ``passes`` (SlimGPT over the plain pass, median of the rounds), ``low, high`` (the extremes
        of it), ``repeats, device``.
    """

    def plain(batches) -> None:
        with inference(model):
            for ids in unpadded(batches):
                model.base_model(input_ids=ids.to(model.device), use_cache=False)

    def pruned(batches) -> None:
        slimgpt(model, batches, **options, progress=False)

    def measured(batches) -> dict:
        plain(batches)  # warms caches and kernels up
        rounds = [
            [timed(model.device, lambda act=act: act(batches))[0] for act in (plain, pruned)]
            for _ in range(repeats)
        ]
        forward, whole = (statistics.median(times) for times in zip(*rounds, strict=True))
        ratios = [slow / fast for fast, slow in rounds]
        return {
            "tokens": sum(batch["input_ids"].numel() for batch in batches),
            "forward_seconds": forward, "slimgpt_seconds": whole,
            "passes": statistics.median(ratios), "low": min(ratios), "high": max(ratios),
            "repeats": repeats, "device": str(model.device),
        }  # fmt: skip

    ledger = ResultCache(out_dir and Path(out_dir) / "timing.jsonl")
    recipe = [fingerprint(model), str(model.device), repeats]  # the hash is kept from now on
    rows = []
    for found in tqdm(calibrations, desc="timing", unit="calibration"):
        key = [*recipe, _settings({"batches": found, **options})]
        rows.append(ledger.get(key, lambda found=found: measured(found)))
    return pd.DataFrame(rows)
