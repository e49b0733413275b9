"""Exercises of notebooks 04 to 06: recovery, answers, domains against each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from torch import nn

from ..domains import Part, Question
from ..evaluation import Answers
from ..models import PruningPlan
from .checking import exercise
from .verdicts import Answer

# 04_recovery_curves


@exercise("count")
def lora_numbers(linear: nn.Linear, r: int) -> Answer:
    """Trainable parameters of a LoRA adapter of one linear layer."""
    rows, columns = linear.weight.shape
    mistakes = {
        "what full fine-tuning trains": rows * columns,
        "B alone; A is trained too": rows * r,
        "A alone; B is trained too": r * columns,
    }
    return Answer(r * (rows + columns), mistakes)


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


@exercise("number")
def forgetting(table: pd.DataFrame, text: Part, pruned: str, recovered: str) -> Answer:
    """Factor by which recovery on one domain changes the perplexity of another."""
    dense, before, after = _levels(table, text, "dense", pruned, recovered)
    mistakes = {
        "the inverse; the perplexity after recovery goes on top": before / after,
        "measured from the dense model; recovery starts at the pruned one": after / dense,
        "the effect of pruning: pruned over dense; recovery comes after it": before / dense,
        "the difference; divide": after - before,
    }
    return Answer(after / before, mistakes)


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


@exercise("share")
def chance_level(questions: Mapping[str, Sequence[Question]]) -> Answer:
    """Accuracy of a guess, over the questions of all domains together."""
    counts = pd.concat({d: pd.Series([len(q.choices) for q in qs]) for d, qs in questions.items()})
    chances = 1 / counts
    of_domains = chances.groupby(level=0).mean()
    mistakes = {
        "1 over the mean number of choices; take the mean of 1 over the number": 1 / counts.mean(),
        "the mean over domains; every question counts once": of_domains.mean(),
        "how often a guess is wrong": 1 - chances.mean(),
    }
    return Answer(chances.mean(), mistakes, tolerance=0.001)


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


@exercise("name")
def stand_in(table: pd.DataFrame, text: str, domains: Sequence[str]) -> Answer:
    """The other domain whose pruned model serves a text best, without recovery."""
    rows = table[(table["text"] == text) & ~table["recovered"] & table["cut"].isin(domains)]
    gaps = rows.set_index("cut")["difference"].drop(text)
    mistakes = {
        "the text's own domain; another one is asked for": text,
        "the one that serves it worst; a difference is a price": gaps.idxmax(),
    }
    return Answer(gaps.idxmin(), mistakes, options=list(domains))


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
