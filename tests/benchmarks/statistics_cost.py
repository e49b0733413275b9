"""Cost of the statistics pass against a plain forward pass over the same tokens.

``python tests/benchmarks/statistics_cost.py`` prints the ratio of processor time for every round;
the bound is 1.15. Rounds alternate, because machines drift.
"""

from __future__ import annotations

import statistics
import time

import torch

import minigpt_lab as lab

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
    batches = lab.tokenize(lab.load_domain("medical").calibration, tokenizer, SEQ_LEN, TOKENS)

    def plain() -> None:
        with torch.no_grad():
            for batch in batches:
                model(**{key: value.to(model.device) for key, value in batch.items()})

    def measured() -> None:
        lab.collect_statistics(model, batches, progress=False)

    plain(), measured()
    ratios = []
    for _ in range(ROUNDS):
        ratios.append(seconds(measured, model.device) / seconds(plain, model.device))
        print(f"statistics ÷ plain forward: {ratios[-1]:.3f}", flush=True)
    print(f"median {statistics.median(ratios):.3f} over {TOKENS} tokens on {model.device}")
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
