"""Cost of the statistics pass against a plain forward pass over the same tokens.

``python tests/benchmarks/statistics_cost.py`` prints ratios of processor time for every round: to a
forward pass of the same precision (with logits of every token; the goal is 1.15), and to one that,
like the pass itself, leaves the logits and the cache out. Rounds alternate, because machines drift.
"""

from __future__ import annotations

import statistics
import time

import torch

import minigpt_lab as lab
from minigpt_lab.models import inference

ROUNDS, TOKENS, SEQ_LEN = 5, 4096, 256


def seconds(function, device: torch.device) -> float:
    """Processor time on a CPU, wall time (synchronised) on an accelerator."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    start = clock()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def main() -> None:
    """Measure and print."""
    model, tokenizer = lab.load_model("smollm2-135m")
    batches = lab.tokenize(
        lab.load_domain("medical").calibration, tokenizer, seq_len=SEQ_LEN, max_tokens=TOKENS
    )

    def forward(**options) -> None:
        with inference(model, "auto"):
            for batch in batches:
                model(**{key: value.to(model.device) for key, value in batch.items()}, **options)

    def bare() -> None:
        forward(use_cache=False, logits_to_keep=1)

    def measured() -> None:
        lab.collect_statistics(model, batches, progress=False)

    bare(), measured()
    ratios = []
    for _ in range(ROUNDS):
        cost, *others = (seconds(call, model.device) for call in (measured, forward, bare))
        ratios.append([cost / other for other in others])
        print("statistics ÷ forward {:.3f}, ÷ bare forward {:.3f}".format(*ratios[-1]), flush=True)
    medians = [statistics.median(column) for column in zip(*ratios, strict=True)]
    print("medians {:.3f} and {:.3f}".format(*medians), f"({TOKENS} tokens, {model.device})")
    found = lab.collect_statistics(model, batches, progress=False)
    plan = lab.contextual_plan(model, found, epsilon_linear=0.05, epsilon_activation=0.05)
    start = time.perf_counter()
    plan.predicted_size(model)
    print(f"predicted_size: {1e3 * (time.perf_counter() - start):.1f} ms")
    start = time.perf_counter()
    lab.contextual_plan(model, found, epsilon_activation=0.05).predicted_size(model)
    print(f"a move of the slider (plan and size): {1e3 * (time.perf_counter() - start):.1f} ms")


if __name__ == "__main__":
    main()
