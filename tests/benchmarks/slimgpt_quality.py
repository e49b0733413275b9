"""What compensation and reconstruction are worth on SmolLM2, inside their domain and outside.

``python tests/benchmarks/slimgpt_quality.py`` calibrates on 8,192 tokens of law and prints held-out
perplexity on law and on a text it knows nothing of (``--other FILE``; by default the games domain),
windows of 1,024, without any fine-tuning. With ``--budgets`` it compares ways to spread a cut of
half of the decoder over the layers, key/value groups or single heads leaving attention (three
quarters of an hour on one thread, most of it the two searches). With ``--reconstruct medical`` it
compares closed form, Wanda, stream error, reconstruction, general text and text that the model
writes itself on that domain and on general text, windows of 256, with paired intervals beside
today's `slimgpt` (``--ratios 0.5``; half an hour on one thread).
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import time
from collections.abc import Iterator
from pathlib import Path

from transformers import PreTrainedModel

import minigpt_lab as lab
from minigpt_lab.architectures import ATTENTION_UNITS

TOKENS, SEQ_LEN, TEST_TOKENS = 8_192, 1_024, 4_096
SHORT = 256  # calibration windows where budgets are compared
HALF = 81_448_128  # parameters, half of the decoder's gone
RATIOS = (0.2, 0.3, 0.5)
ALLOCATIONS = ("uniform", "log-increase", "search")
PAPER = {"damping": 0.01, "damping_mode": "mean", "saliency": "slimgpt"}  # as SlimGPT's code does
VARIANTS = {
    "SlimGPT, damped by its features": {},
    "the same, uniform": {"allocation": "uniform"},
    "SlimGPT, damped as in its code": PAPER,
    "without compensation": {"compensate": False},
}
FITTED: dict[str, dict | None] = {  # the first is today's
    "slimgpt": {},
    "Wanda": None,  # not compensated
    "+ half of the stream's error": {"stream_share": 0.5},
    "+ general text, a quarter": {"generality": 0.25},
    "+ its own text, a quarter": {"general": "own", "generality": 0.25},
    "+ general text": {"generality": 0.5},
    "+ reconstruction": {"reconstruct": True},
    "+ both, a quarter general": {"reconstruct": True, "generality": 0.25},
    "+ both, half general": {"reconstruct": True, "generality": 0.5},
    "+ all three": {"stream_share": 0.5, "reconstruct": True, "generality": 0.25},
    "+ search": {"allocation": "search"},
    "+ search, a quarter general": {"allocation": "search", "generality": 0.25},
    "+ search and dropped blocks": {"allocation": "search", "drop_blocks": True},
    "+ search and both, a quarter general": {
        "allocation": "search",
        "reconstruct": True,
        "generality": 0.25,
    },
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--other", type=Path, help="a text file, read from its start")
    parser.add_argument("--budgets", action="store_true", help="half of the decoder, by allocation")
    parser.add_argument("--reconstruct", metavar="DOMAIN", help="closed form and reconstruction")
    parser.add_argument("--ratios", nargs="+", type=float, default=RATIOS)
    parser.add_argument("--variants", nargs="+", default=[*FITTED])
    parser.add_argument("--sites", nargs="+", default=["ffn"], help="of --reconstruct")
    parser.add_argument("--sample", type=int, default=0, help="which calibration text, from 0")
    parser.add_argument("--test-tokens", type=int, default=2 * TEST_TOKENS)
    given = parser.parse_args()
    model, tokenizer = lab.load_model("smollm2-135m")
    if given.reconstruct:
        fitted(model, tokenizer, given)
        return
    law = lab.load_domain("law")
    other = given.other.read_text() if given.other else lab.load_domain("games").test
    cuts = budgets(model, tokenizer, law) if given.budgets else sizes(model, tokenizer, law)
    print("| cut | M stored | law | other |\n| --- | --- | --- | --- |")
    for name, cut in itertools.chain([("dense", model)], cuts):
        protocol = {"seq_len": SEQ_LEN, "max_tokens": TEST_TOKENS}
        texts = (law.test, other)
        found = [lab.perplexity(cut, tokenizer, text, **protocol).value for text in texts]
        size = lab.model_size(cut).stored / 1e6
        print(f"| {name} | {size:.1f} | {found[0]:.2f} | {found[1]:.2f} |", flush=True)


def fitted(model, tokenizer, given: argparse.Namespace) -> None:
    """Print perplexities, and their ratios to today's `slimgpt`, with paired intervals."""
    domain, general = lab.load_domains([given.reconstruct, "general"])
    own, other = (
        lab.tokenize(
            each.calibration, tokenizer, seq_len=SHORT, max_tokens=TOKENS * (given.sample + 1)
        ).samples(given.sample + 1)[given.sample]
        for each in (domain, general)
    )

    own_text = functools.cache(lambda: written(model, tokenizer))
    texts = {"own": own_text, None: lambda: other}

    def measured(cut: PreTrainedModel) -> list[lab.Perplexity]:
        protocol = {"max_tokens": given.test_tokens, "progress": False}
        return [lab.perplexity(cut, tokenizer, each.test, **protocol) for each in (domain, general)]

    def show(name: str, found: list[lab.Perplexity], seconds: float, words: list[str]) -> None:
        values = " | ".join(f"{each.value:.2f}" for each in found)
        print(f"| {name} | {values} | {' | '.join(words)} | {seconds:.0f} |", flush=True)

    print("| cut | in | out | in / slimgpt | out / slimgpt | CPU s |")
    print("| --- | --- | --- | --- | --- | --- |")
    show("dense", measured(model), 0, ["", ""])
    for ratio in given.ratios:
        today: list[lab.Perplexity] = []
        for name in given.variants:
            options = {"ratio": ratio, "sites": given.sites, "progress": False}
            options |= FITTED[name] or {}
            if "generality" in options:
                options["general"] = texts[options.get("general")]()
            began = time.process_time()
            if FITTED[name] is None:
                scores = lab.score(model, "wanda", own, sites=given.sites)
                cut = lab.shrink(model, lab.plan_from_scores(model, scores, ratio=ratio))
            else:
                cut, _ = lab.slimgpt(model, own, **options)
            seconds, found = time.process_time() - began, measured(cut)
            words = (
                [paired(*pair) for pair in zip(today, found, strict=True)] if today else ["", ""]
            )
            today = today or found
            show(f"{ratio:.0%} {name}", found, seconds, words)


def written(model, tokenizer) -> list[dict]:
    """Text that the model writes itself, as many tokens as of the others."""
    texts = lab.sample_texts(model, tokenizer, max_tokens=TOKENS, seq_len=SHORT)
    return lab.tokenize(texts, tokenizer, seq_len=SHORT, max_tokens=TOKENS)


def paired(today: lab.Perplexity, found: lab.Perplexity) -> str:
    """Ratio of two perplexities on the same passages, with its 95 % interval."""
    row = lab.compare({"today": today, "now": found}).iloc[0]
    ratio, low, high = (math.exp(row[name]) for name in ("difference", "low", "high"))
    return f"{ratio:.3f} [{low:.3f}, {high:.3f}]"


def sizes(model, tokenizer, law) -> Iterator[tuple[str, PreTrainedModel]]:
    """Channels at three sizes, then a third of the heads."""
    batches, quiet = (
        lab.tokenize(law.calibration, tokenizer, seq_len=SEQ_LEN, max_tokens=TOKENS),
        {"progress": False},
    )
    wanda = lab.score(model, "wanda", batches, sites=("ffn",))
    for ratio in RATIOS:
        yield (
            f"{ratio:.0%} Wanda",
            lab.shrink(model, lab.plan_from_scores(model, wanda, ratio=ratio)),
        )
        for name, options in VARIANTS.items():
            mini, _ = lab.slimgpt(model, batches, ratio=ratio, sites=("ffn",), **options, **quiet)
            yield f"{ratio:.0%} {name}", mini
    third = {"attention": [1] * 30}
    for saliency in ("exact", "slimgpt", "diag"):
        heads = {"sites": ("attention",), "counts": third, "saliency": saliency}
        yield f"1 of 3 groups, {saliency}", lab.slimgpt(model, batches, **heads, **quiet)[0]
    heads = {"units": "balanced_heads", "sites": ("attention",)}
    third = {"balanced_heads": third["attention"]}
    yield "1 of 3 heads each", lab.slimgpt(model, batches, counts=third, **heads, **quiet)[0]


def budgets(model, tokenizer, law) -> Iterator[tuple[str, PreTrainedModel]]:
    """Heads and channels, half of the decoder's parameters, over the layers in several ways."""
    batches = list(lab.tokenize(law.calibration, tokenizer, seq_len=SHORT, max_tokens=TOKENS))
    for units, allocation in itertools.product(ATTENTION_UNITS, ALLOCATIONS):
        how = {"units": units, "allocation": allocation}
        yield f"{allocation}, {units}", lab.slimgpt(model, batches, parameters=HALF, **how)[0]


if __name__ == "__main__":
    main()
