"""Cost of the zeroth-order estimate against the forward passes that it needs.

``python tests/benchmarks/spsa_cost.py`` estimates the gradients of SmolLM2's FFN and attention as
the criterion "sensitivity" does, with a direction of its own for each window, and prints the ratio
of its processor time to that of two losses of every window. Rounds alternate, because machines
drift.
"""

from __future__ import annotations

import statistics
import time

import torch

import minigpt_lab as lab
from minigpt_lab.architectures import SITES
from minigpt_lab.calibration.losses import window_losses
from minigpt_lab.calibration.spsa import estimate_gradients, scored_weights
from minigpt_lab.models.runtime import inference

ROUNDS, TOKENS, SEQ_LEN = 3, 512, 256


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    model, tokenizer = lab.load_model("smollm2-135m", device="cpu")
    text = lab.load_domain("medical").calibration
    batches = lab.tokenize(text, tokenizer, seq_len=SEQ_LEN, max_tokens=TOKENS)
    windows = [row for batch in batches for row in batch["input_ids"].split(1)]
    names = scored_weights(model, SITES)

    def passes() -> None:
        with inference(model):
            for ids in windows * 2:
                window_losses(model, ids)

    def estimate() -> None:
        found = estimate_gradients(model, batches, names, per_sample=True)
        for name in names:
            found[name]

    passes()
    seconds = {passes: [], estimate: []}
    for _ in range(ROUNDS):
        for call, times in seconds.items():
            start = time.process_time()
            call()
            times.append(time.process_time() - start)
    forward, cost = (statistics.median(times) for times in seconds.values())
    print(f"{len(windows)} windows of {SEQ_LEN} tokens, two passes each: {forward:.2f} s")
    print(f"estimate ÷ passes {cost / forward:.2f}")


if __name__ == "__main__":
    main()
