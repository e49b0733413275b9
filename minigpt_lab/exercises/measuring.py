"""Exercises of notebooks 04 to 06: recovery, answers, domains against each other."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from ..domains import Part
from ..evaluation import Answers
from ..models import PruningPlan
from .checking import exercise
from .functions import normal
from .verdicts import Answer

# 04_recovery_curves


@exercise("function")
def lora_merge() -> Answer:
    """The weight of a linear layer with a LoRA adapter merged into it."""

    def scaled(scale):
        return lambda W, B, A, alpha: W + scale(alpha, B, A) * B @ A

    right = scaled(lambda alpha, B, A: alpha / A.shape[0])
    mistakes = {
        "without the factor α/r": scaled(lambda alpha, B, A: 1),
        "with the factor α; divide it by the rank r": scaled(lambda alpha, B, A: alpha),
        "with α over the layer's inputs; r is the number of rows of A": (
            scaled(lambda alpha, B, A: alpha / A.shape[1])
        ),
        "with α over the layer's outputs; r is the number of columns of B": (
            scaled(lambda alpha, B, A: alpha / B.shape[0])
        ),
        "the update alone; W is kept below it": lambda W, B, A, alpha: right(0, B, A, alpha),
        "with W scaled too; α/r belongs to B A": (
            lambda W, B, A, alpha: alpha / A.shape[0] * (W + B @ A)
        ),
    }
    W, B, A = normal(6, 5), normal(6, 3, seed=1), normal(3, 5, seed=2)
    cases = {"rank 3": (W, B, A, 16), "rank 2": (W, B[:, :2], A[:2], 8)}
    return Answer(right, mistakes, cases=cases)


@exercise("function")
def distillation_loss() -> Answer:
    """``T² KL(p_T ‖ q_T)`` per token, of a student's and a teacher's logits (arXiv 1503.02531)."""

    def logs(student, teacher, T):
        return (student / T).log_softmax(-1), (teacher / T).log_softmax(-1)

    def divergence(log_q, log_p):
        return (log_p.exp() * (log_p - log_q)).sum(-1).mean()

    def right(student, teacher, T):
        return T**2 * divergence(*logs(student, teacher, T))

    def cross_entropy(student, teacher, T):
        log_q, log_p = logs(student, teacher, T)
        return -(T**2) * (log_p.exp() * log_q).sum(-1).mean()

    mistakes = {
        "KL(q ‖ p); the teacher's p comes first": lambda q, p, T: right(p, q, T),
        "without the factor T², which keeps the gradient's size": (
            lambda q, p, T: right(q, p, T) / T**2
        ),
        "with T instead of T²": lambda q, p, T: right(q, p, T) / T,
        "with the student's logits not divided by T": lambda q, p, T: right(q * T, p, T),
        "at T = 1; divide the logits by T": lambda q, p, T: T**2 * right(q, p, 1),
        "the sum over tokens; take their mean": lambda q, p, T: len(q) * right(q, p, T),
        "the mean over the vocabulary too; a KL is a sum over it": (
            lambda q, p, T: right(q, p, T) / q.shape[-1]
        ),
        "the cross-entropy; take the teacher's entropy away": cross_entropy,
    }
    student, teacher = 2 * normal(5, 7), 2 * normal(5, 7, seed=1)
    cases = {"T = 1": (student, teacher, 1.0), "T = 2": (student, teacher, 2.0)}
    return Answer(right, mistakes, cases=cases)


def _levels(table: pd.DataFrame, text: Part, *variants: str) -> list[float]:
    perplexities = table[table["text"] == str(text)].set_index("variant")["perplexity"]
    return [float(perplexities[variant]) for variant in variants]


@exercise("number")
def recovered_share(table: pd.DataFrame, text: Part, pruned: str, recovered: str) -> Answer:
    """Share of the lost nats per token that recovery takes back."""
    levels = _levels(table, text, "dense", pruned, recovered)
    dense, before, after = np.log(levels)
    value = (before - after) / (before - dense)
    mistakes = {
        "what is still missing; the share taken back is asked for": 1 - value,
        "a percentage; divide by 100": 100 * value,
        "taken from perplexities; a loss is the logarithm of one": (
            (levels[1] - levels[2]) / (levels[1] - levels[0])
        ),
        "the loss taken back in nats; divide it by the loss that pruning cost": before - after,
    }
    return Answer(value, mistakes)


# 05_mcq_evaluation


@exercise("number")
def questions_needed(accuracy: float, margin: float) -> Answer:
    """Number of questions that give an accuracy to a margin, with 95 % confidence."""
    variance = accuracy * (1 - accuracy)
    value = 1.96**2 * variance / margin**2
    mistakes = {
        "enough for one standard error; 95 % takes 1.96 of them": variance / margin**2,
        "enough for an interval this wide in all; the margin goes both ways": value / 4,
        "enough for half the margin": 4 * value,
        "its square root; the interval shrinks with the root of n": value**0.5,
    }
    return Answer(value, mistakes, tolerance=0.05)


@exercise("function")
def mcnemar_p() -> Answer:
    """P of McNemar's exact test that two models answer the same questions equally well."""

    def test(k, n):
        from scipy.stats import binomtest  # here, because it takes a second to import

        return binomtest(int(k), int(n)).pvalue if n else 1.0

    def only(first, second):
        return (first & ~second).sum(), (second & ~first).sum()

    def right(first, second):
        one, other = only(first, second)
        return test(one, one + other)

    def one_sided(first, second):
        one, other = only(first, second)
        n = one + other
        return sum(math.comb(n, k) for k in range(min(one, other) + 1)) / 2.0**n

    def approximate(first, second):
        one, other = only(first, second)
        return math.erfc(abs(one - other) / math.sqrt(2 * max(one + other, 1)))

    mistakes = {
        "one-sided; a difference either way counts, so double the tail": one_sided,
        "with all questions as n; only those that one model alone got right tell": (
            lambda first, second: test(only(first, second)[0], len(first))
        ),
        "of the right answers of both; take away those that both got right": (
            lambda first, second: test(first.sum(), first.sum() + second.sum())
        ),
        "the normal approximation; the exact test is binomial": approximate,
        "1 − p": lambda first, second: 1 - right(first, second),
    }
    first = np.arange(20) < 9
    second = np.isin(np.arange(20), [0, 1, 2, 3, 9, 10, 11, 12, 13, 14, 15, 16])
    second[8] = True
    cases = {"two models": (first, second), "two models that answer alike": (first, first)}
    return Answer(right, mistakes, cases=cases)


@exercise("share")
def summed_score(found: Answers) -> Answer:
    """Accuracy if the summed log-probability of a choice decided."""
    frame = found.frame

    def accuracy(loss: pd.Series) -> float:
        """Share of questions of which the choice with the lowest loss is the answer."""
        return float(frame.loc[loss.groupby(frame["question"]).idxmin(), "is_answer"].mean())

    whole = "that of question and choice together; take the choice alone"
    mistakes = {
        "that of the mean per token; take the sum": accuracy(frame["nll"] / frame["tokens"]),
        "that of the least likely choice: nll is a loss, the lowest wins": accuracy(-frame["nll"]),
        whole: accuracy(frame["whole_nll"]),
    }
    return Answer(accuracy(frame["nll"]), mistakes, tolerance=0.001)


# 06_domain_matrix


@exercise("function")
def paired_interval() -> Answer:
    """95 % interval of the difference of two models' losses per token, by a paired bootstrap."""

    def quantiles(values, tail=0.025):
        return tuple(np.quantile(values, [tail, 1 - tail]))

    def resampled(loss, other, tokens, picks):
        return (other - loss)[picks].sum(1) / tokens[picks].sum(1)

    def right(loss, other, tokens, picks):
        return quantiles(resampled(loss, other, tokens, picks))

    def of_ratios(loss, other, tokens, picks):
        return quantiles(((other - loss) / tokens)[picks].mean(1))

    def of_intervals(loss, other, tokens, picks):
        one, two = (quantiles(each[picks].sum(1) / tokens[picks].sum(1)) for each in (loss, other))
        return two[0] - one[0], two[1] - one[1]

    mistakes = {
        "the first model's less the second's; turn it round": (
            lambda loss, other, *rest: right(other, loss, *rest)
        ),
        "the mean of each passage's loss per token; a long passage counts more": of_ratios,
        "per passage; divide the summed loss by the summed tokens": (
            lambda loss, other, tokens, picks: right(loss, other, np.ones_like(tokens), picks)
        ),
        "the difference of two intervals; take the differences first, both on the same picks": (
            of_intervals
        ),
        "a 90 % interval; 2.5 % are left out at each end": (
            lambda *inputs: quantiles(resampled(*inputs), 0.05)
        ),
        "ratios of perplexities; the difference is asked for, in nats": (
            lambda *inputs: tuple(np.exp(right(*inputs)))
        ),
    }
    rng = np.random.default_rng(0)
    tokens = rng.integers(20, 400, 12).astype(float)
    loss = tokens * rng.uniform(2, 4, 12)
    other = loss + tokens * rng.normal(0.05, 0.2, 12)
    picks = rng.integers(12, size=(400, 12))
    cases = {"twelve passages": (loss, other, tokens, picks)}
    return Answer(right, mistakes, cases=cases)


@exercise("number")
def price_as_a_factor(table: pd.DataFrame, cut: str, text: str) -> Answer:
    """Perplexity of a model pruned for another domain over that of the text's own, from nats."""
    rows = table[(table["text"] == text) & ~table["recovered"]].set_index("cut")
    nats, perplexities = float(rows.loc[cut, "difference"]), rows["perplexity"]
    mistakes = {
        "the difference in nats; undo the logarithm": nats,
        "2 to the difference; nats go with e": 2**nats,
        "the inverse; the model of the other domain goes on top": np.exp(-nats),
        "the difference of the perplexities; divide them": perplexities[cut] - perplexities[text],
    }
    return Answer(np.exp(nats), mistakes)


@exercise("set")
def common_core(plans: Mapping[tuple[str, int], PruningPlan], domains: Sequence[str]) -> Answer:
    """Channels of the first layer that the plans of all domains' first samples keep."""
    kept = {cut: {*plan.keep["ffn"][0]} for (cut, draw), plan in plans.items() if draw == 0}
    own: list[set] = [kept[name] for name in domains]
    every = set.intersection(*kept.values())
    mistakes = {
        "what at least one domain keeps; all must keep it": set.union(*own),
        "what the controls keep too; take the domains' plans alone": every,
        "what the first domain keeps; the others have a say": own[0],
    }
    return Answer(set.intersection(*own), mistakes)
