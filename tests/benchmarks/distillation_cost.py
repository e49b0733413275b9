"""Cost of the distillation loss against that of labels, at the vocabulary of SmolLM2.

``python tests/benchmarks/distillation_cost.py`` prints processor time of loss and gradient for
1,024 tokens, without the models that give the logits: labels by torch's cross-entropy, and ratios
to it of the loss "mix" with all predictions of a teacher, with 12 sampled tokens, and as autograd
would do it. Rounds alternate, because machines drift.
"""

from __future__ import annotations

import statistics
import time
from types import SimpleNamespace

import torch
from torch.nn import functional

from minigpt_lab.recovery.distillation import DistillationLoss

ROUNDS, WINDOWS, SEQ_LEN, VOCABULARY = 5, 4, 256, 49_152


def label(z, labels):
    """Cross-entropy of the next token, as transformers computes it."""
    return functional.cross_entropy(z[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())


def autograd(z, labels, teacher):
    """Half labels, half KL, with the gradient that autograd finds."""
    log_q = z[:, :-1].float().log_softmax(-1).flatten(0, 1)
    log_p = teacher.logits(labels)[:, :-1].float().log_softmax(-1).flatten(0, 1)
    divergence = functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    return (divergence + functional.nll_loss(log_q, labels[:, 1:].flatten())) / 2


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    student, known = 3 * torch.randn(2, WINDOWS, SEQ_LEN, VOCABULARY)
    labels = torch.randint(VOCABULARY, (WINDOWS, SEQ_LEN))
    tokens = torch.randint(VOCABULARY, (WINDOWS, SEQ_LEN - 1, 12))
    known = known.bfloat16()  # as a teacher is read
    teacher, sampler = (
        SimpleNamespace(
            temperature=1.0, samples=samples, logits=lambda _: known, sampled=lambda _: tokens
        )
        for samples in (None, 12)
    )
    losses = {
        "label": label,
        "mix": lambda z, y: DistillationLoss(teacher, 0.5)({"logits": z}, y),
        "mix, sampled": lambda z, y: DistillationLoss(sampler, 0.5)({"logits": z}, y),
        "mix by autograd": lambda z, y: autograd(z, y, teacher),
    }
    seconds = {name: [] for name in losses}
    for _ in range(ROUNDS):
        for name, loss in losses.items():
            z = student.clone().requires_grad_()
            start = time.process_time()
            loss(z, labels).backward()
            seconds[name].append(time.process_time() - start)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    for name, median in medians.items():
        print(f"{name:16} {median:5.2f} s, {median / medians['label']:4.2f} × label")


if __name__ == "__main__":
    main()
