"""Tokens per second in bfloat16 against float32, of every kind of pass; and what it costs.

``python tests/benchmarks/precision_gain.py`` prints ratios of processor time (on a GPU: of time)
for every round, both precisions right after each other in one process: perplexity (and how far its
value is off), statistics (also against a plain pass in the same precision, which reads no logits),
questions, and a fine-tune. What bfloat16 gains depends on the processor, whose name is printed.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from functools import partial

import torch

import minigpt_lab as lab
from minigpt_lab.experiments.records import processor_name
from minigpt_lab.models import has_fast_bfloat16, inference

SEQ_LEN = 256
PRECISIONS = ("float32", "bfloat16")


def seconds(function, device: torch.device):
    """A function's result, and its processor time on a CPU, wall time on an accelerator."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    start = clock()
    result = function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return result, clock() - start


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=4_096)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = lab.load_model("smollm2-135m")
    domain, device = lab.load_domain("medical"), model.device
    cut = {"seq_len": SEQ_LEN, "max_tokens": options.tokens}
    batches = lab.tokenize(domain.calibration, tokenizer, **cut)
    text = lab.excerpt(domain.test, tokenizer, max_tokens=options.tokens)
    questions = domain.questions[: options.tokens // 100]

    def plain(precision: str) -> None:
        with inference(model, precision):
            for batch in batches:
                model(input_ids=batch["input_ids"].to(device), use_cache=False, logits_to_keep=1)

    def trained(precision: str) -> None:
        subject, how = copy.deepcopy(model), {"eval_every": 10**9, "eval_characters": 1_000}
        lab.recover(subject, tokenizer, domain, precision=precision, progress=False, **cut, **how)

    quiet = {"progress": False}
    passes = {
        "plain pass": plain,
        "perplexity": lambda p: lab.perplexity(
            model, tokenizer, text, max_characters=None, precision=p, **quiet
        ),
        "statistics": lambda p: lab.collect_statistics(model, batches, precision=p, **quiet),
        "questions": lambda p: lab.answer_questions(
            model, tokenizer, questions, precision=p, **quiet
        ),
        "fine-tune": trained,
    }
    where = (
        torch.cuda.get_device_name() if device.type == "cuda" else f"{processor_name()}, one thread"
    )
    print(f"{where}; fast bfloat16: {has_fast_bfloat16(device)}; {options.tokens:,} tokens")
    plain("bfloat16"), plain("float32")  # warm up
    gains: dict[str, list[float]] = {}
    for _ in range(options.rounds):
        took = {}
        for name, run in passes.items():
            for precision in PRECISIONS:
                result, took[name, precision] = seconds(partial(run, precision), device)
                if name == "perplexity":
                    took["value", precision] = result.value
            gains.setdefault(name, []).append(took[name, "float32"] / took[name, "bfloat16"])
        over = took["statistics", "bfloat16"] / took["plain pass", "bfloat16"]
        gains.setdefault("statistics ÷ plain pass, both bfloat16", []).append(over)
        off = took["value", "bfloat16"] / took["value", "float32"] - 1
        print(f"perplexity {took['value', 'float32']:.3f}, in bfloat16 {off:+.3%}", flush=True)
        print({name: round(values[-1], 2) for name, values in gains.items()}, flush=True)
    print("medians", {name: round(statistics.median(values), 2) for name, values in gains.items()})


if __name__ == "__main__":
    main()
