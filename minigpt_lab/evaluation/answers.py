"""Multiple-choice questions: the likeliest choice by three scores, as cloze or as letters."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from math import sqrt

import numpy as np
import pandas as pd
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..checks import Flag, Instance, Integer, ListOf, Model, OneOf, Tokenizer, checked
from ..domains import Question
from ..models import PRECISION, inference, tokenizer_for
from .continuations import Packed, branch_losses, first_difference, longest, pack
from .results import OneRow
from .windows import by_length, finite_or_float32, require_same

#: Each score of a choice, from its row in `Answers.frame`; the lowest wins, the highest logprob.
SCORES = {
    "perplexity": lambda row: np.exp(row["nll"] / row["tokens"]),
    "logprob": lambda row: -row["nll"],
    "paper": lambda row: np.exp(row["whole_nll"] / (row["whole_tokens"] - 1)) / row["whole_tokens"],
}
STYLES = ("cloze", "letters")


@dataclass(frozen=True, eq=False, repr=False)
class Answers(OneRow):
    """A model's answers, with everything needed to compare them.

    Parameters
    ----------
    frame : pandas.DataFrame
        One row per question and choice: ``question`` (its number), ``source``, ``choice``,
        ``text``, ``is_answer``, ``picked``, ``score``, ``nll`` and ``tokens`` (summed negative
        log-likelihood of the choice's tokens, nats, and their number), ``whole_nll`` and
        ``whole_tokens`` (the same of question and choice; the first token has no likelihood),
        ``truncated`` (tokens removed from the front of the prompt). Of `write_answers` it has
        ``written``, the text, instead of scores; where it is none of the choices, none is picked.
    questions : tuple of Question
        The questions, in order.
    score, style : str
        Score of a choice, and style of the prompt; ``"match"`` and ``"written"`` of written ones.
    precision : str
        Type that the model was read in.
    seq_len : int
        Most tokens of question and choice (of written answers: of question and answer).
    max_new_tokens : int, optional
        Most tokens of a written answer.
    """

    frame: pd.DataFrame
    questions: tuple[Question, ...]
    score: str
    style: str
    precision: str = "float32"
    seq_len: int = 1 << 30
    max_new_tokens: int | None = None

    @property
    def correct(self) -> np.ndarray:
        """Whether each question was answered right, ``[question]``."""
        return self.frame.loc[self.frame["is_answer"], "picked"].to_numpy()

    @property
    def n(self) -> int:
        """Number of questions."""
        return len(self.questions)

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return float(self.correct.mean())

    @property
    def low(self) -> float:
        """Lower end of the 95 % interval (Wilson)."""
        return _wilson(int(self.correct.sum()), self.n)[0]

    @property
    def high(self) -> float:
        """Upper end of the 95 % interval (Wilson)."""
        return _wilson(int(self.correct.sum()), self.n)[1]

    @property
    def chance(self) -> float:
        """Accuracy of a guess: the mean of one over the number of choices; 0 of written ones."""
        guesses = [1 / len(question.choices) for question in self.questions]
        return 0.0 if self.style == "written" else float(np.mean(guesses))

    def __float__(self) -> float:
        return self.accuracy

    def __repr__(self) -> str:
        return (
            f"accuracy {self.accuracy:.1%} [{self.low:.1%}, {self.high:.1%}] of {self.n} items, "
            f"chance {self.chance:.1%}, score={self.score}, {self.style}, {self.precision}"
        )

    def sheet(self) -> pd.DataFrame:
        """One row per question: ``question, answer, picked`` (or written) ``, right``."""
        rows, shown = ("is_answer", "written") if self.style == "written" else ("picked", "text")
        return pd.DataFrame(
            {
                "question": [question.question for question in self.questions],
                "answer": [question.choices[question.answer] for question in self.questions],
                "picked": self.frame.loc[self.frame[rows], shown].to_numpy(),
                "right": self.correct,
            }
        )

    def row(self) -> dict:
        """The numbers as one row of a table."""
        interval = {"low": self.low, "high": self.high, "items": self.n, "chance": self.chance}
        protocol = {name: getattr(self, name) for name in ("score", "style", "precision")}
        return {"accuracy": self.accuracy, **interval, **protocol}


@dataclass(frozen=True, repr=False)
class Comparison(OneRow):
    """Two models on the same questions.

    Parameters
    ----------
    difference : float
        Accuracy of the second less that of the first.
    low, high : float
        Its 95 % interval for paired shares (Newcombe 1998, method 10).
    first_only, second_only : int
        Questions that only one of them answered right.
    p : float
        Of the exact McNemar test (two-sided binomial on those questions).
    items : int
        Questions.
    """

    difference: float
    low: float
    high: float
    first_only: int
    second_only: int
    p: float
    items: int

    def __repr__(self) -> str:
        return (
            f"accuracy {self.difference:+.1%} [{self.low:+.1%}, {self.high:+.1%}] on {self.items} "
            f"items; right only first {self.first_only}, only second {self.second_only}, "
            f"p={self.p:.2g} (exact McNemar)"
        )


QUESTIONS = ListOf(Instance(Question), least=1)
QUESTIONS.remedy = "pass e.g. domain.questions (a short test part may yield none)"
_ASKED = {
    "model": Model(),
    "tokenizer": Tokenizer(),
    "questions": QUESTIONS,
    "score": OneOf(SCORES),
    "style": OneOf(STYLES),
}


@checked(
    **_ASKED, seq_len=Integer(1) | None, batch_size=Integer(1), precision=PRECISION, progress=Flag()
)
def answer_questions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    *,
    score: str = "perplexity",
    style: str = "cloze",
    seq_len: int | None = None,
    batch_size: int = 8,
    precision: str = "auto",
    progress: bool = True,
) -> Answers:
    """Answer multiple-choice questions by the likelihood of each choice.

    Parameters
    ----------
    model, tokenizer
        A pair; a trimmed model also takes its original tokenizer, which is trimmed alike.
    questions : sequence of Question
        E.g. ``domain.questions[:200]``.
    score : {"perplexity", "logprob", "paper"}
        ``"perplexity"``: of the choice's tokens given the question. ``"logprob"``: their summed
        log-probability, which favours short choices. ``"paper"``: the rule of the Mini-GPTs
        reference code, ``exp(mean loss of question and choice) / tokens``; length counts twice in
        it, which favours long choices, so use it only to compare with that paper.
    style : {"cloze", "letters"}
        ``"cloze"``: the choice follows the question; their order cannot matter. ``"letters"``: the
        choices are listed as A, B, …, and the letter is scored; their order can (`position_bias`).
    seq_len : int, optional
        Most tokens of question and choice; by default what the model takes. Longer questions lose
        their beginning, alike for all choices.
    batch_size : int
        Questions per forward pass.
    precision : {"auto", "bfloat16", "float32"}
        Type that the model is read in, as for `perplexity`.
    progress : bool
        Show a progress bar.

    Returns
    -------
    Answers

    Raises
    ------
    ValueError
        If there are no questions, an option is unknown, a choice has no tokens or does not fit,
        tokenizer and model do not belong together, or the model answers with NaN.
    """
    tokenizer = tokenizer_for(model, tokenizer)
    packed, limit = [], longest(model, seq_len)
    for number, question in enumerate(questions):
        prompt, continuations = _texts(question, style)
        try:
            packed.append(pack(prompt, continuations, tokenizer, limit))
        except ValueError as error:
            raise ValueError(f"question {number} ({question!s}): {error}") from error
    groups = by_length([len(entry.ids) for entry in packed], batch_size)
    losses: dict[int, np.ndarray] = {}

    def read(precision: str) -> np.ndarray:
        with inference(model, precision):
            for group in tqdm(groups, desc="questions", unit="batch", disable=not progress):
                nll = branch_losses(model, [packed[i] for i in group])
                losses.update(zip(group, nll, strict=True))
        return np.array([losses[number].sum() for number in range(len(packed))])

    _, dtype = finite_or_float32(
        read, [model], precision, lambda i: f"question {i} ({questions[i]!s})"
    )
    rows = []
    for number, (question, entry) in enumerate(zip(questions, packed, strict=True)):
        rows += _rows(number, question, entry, losses[number], score)
    return Answers(pd.DataFrame(rows), tuple(questions), score, style, dtype, limit)


def _texts(question: Question, style: str) -> tuple[str, list[str]]:
    """The prompt, and what follows it (after a space) for every choice."""
    if style == "cloze":
        return question.prompt, list(question.choices)
    letters = string.ascii_uppercase[: len(question.choices)]
    if len(letters) < len(question.choices):
        raise ValueError(f"{question!s} has {len(question.choices)} choices, more than letters")
    listed = [f"{x}. {choice}" for x, choice in zip(letters, question.choices, strict=True)]
    return "\n".join([question.prompt, *listed, "Answer:"]), list(letters)


def _rows(
    number: int, question: Question, entry: Packed, losses: np.ndarray, score: str
) -> list[dict]:
    """A question's rows of `Answers.frame`."""
    rows, shared = [], losses[: entry.shared - 1].sum()  # losses[i] is of token i + 1
    for choice, (branch, start) in enumerate(zip(entry.branches, entry.starts, strict=True)):
        row = {
            "question": number,
            "source": question.source,
            "choice": choice,
            "text": question.choices[choice],
            "is_answer": choice == question.answer,
            "nll": losses[start - 1 : branch.stop - 1].sum(),
            "tokens": branch.stop - start,
            "whole_nll": shared + losses[branch.start - 1 : branch.stop - 1].sum(),
            "whole_tokens": entry.shared + branch.stop - branch.start,
            "truncated": entry.truncated,
        }
        rows.append({**row, "score": SCORES[score](row)})
    sign = -1 if score == "logprob" else 1
    # Equal scores (letters in bfloat16) must not favour a position: the text's hash decides.
    best = min(rows, key=lambda row: (sign * row["score"], sha256(row["text"].encode()).digest()))
    return [{**row, "picked": row is best} for row in rows]


_ANSWERS = Instance(Answers, "answer_questions gives them")


@checked(first=_ANSWERS, second=_ANSWERS)
def compare_answers(first: Answers, second: Answers) -> Comparison:
    """Compare two models' answers to the same questions, question by question.

    Parameters
    ----------
    first, second : Answers
        E.g. of the dense and of the pruned model.

    Returns
    -------
    Comparison

    Raises
    ------
    ValueError
        If they did not answer the same questions, or were asked, shortened, judged or read
        differently.
    """
    from scipy.stats import binomtest  # here, because it takes a second to import

    protocol = ["precision"]
    if (first.style == "written") == (second.style == "written"):  # they may be compared, too
        protocol += ["score", "style", "max_new_tokens"]
        if first.frame["truncated"].any() or second.frame["truncated"].any():
            protocol.append("seq_len")
    for name in protocol:
        require_same(name, getattr(first, name), getattr(second, name))
    if first.questions != second.questions:
        place = first_difference(first.questions, second.questions)
        raise ValueError(
            f"the answers are to different questions ({first.n} and {second.n}, the first "
            f"difference at number {place}); give both models the same ones"
        )
    both = int((first.correct & second.correct).sum())
    first_only = int(first.correct.sum()) - both
    second_only = int(second.correct.sum()) - both
    discordant = first_only + second_only
    p = binomtest(second_only, discordant).pvalue if discordant else 1.0
    low, high = _newcombe(both, second_only, first_only, first.n)
    difference = (second_only - first_only) / first.n
    return Comparison(difference, low, high, first_only, second_only, float(p), first.n)


def _wilson(right: int, n: int) -> tuple[float, float]:
    from scipy.stats import binomtest

    interval = binomtest(right, n).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def _newcombe(both: int, second_only: int, first_only: int, n: int) -> tuple[float, float]:
    """95 % interval of the difference of two paired shares p₂ - p₁ (Newcombe 1998, method 10).

    With Wilson intervals [l, u] of each share and the correlation φ of the pairs:
    low = p₂ - p₁ - √((p₂ - l₂)² - 2φ (p₂ - l₂)(u₁ - p₁) + (u₁ - p₁)²), and high likewise.
    """
    right2, right1 = both + second_only, both + first_only
    p2, p1 = right2 / n, right1 / n
    (l2, u2), (l1, u1) = _wilson(right2, n), _wilson(right1, n)
    neither = n - both - second_only - first_only
    margins = right2 * (n - right2) * right1 * (n - right1)
    product: float = both * neither - second_only * first_only
    if product > 0:
        product = max(product - n / 2, 0.0)  # continuity correction
    phi = product / sqrt(margins) if margins else 0.0

    def margin(a: float, b: float) -> float:
        return sqrt(max(0.0, a * a - 2 * phi * a * b + b * b))

    return p2 - p1 - margin(p2 - l2, u1 - p1), p2 - p1 + margin(u2 - p2, p1 - l1)


@checked(**_ASKED)
def position_bias(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    *,
    score: str = "perplexity",
    style: str = "letters",
    **options,
) -> pd.DataFrame:
    """Accuracy by the position of the right choice, over every rotation of the choices.

    Parameters
    ----------
    model, tokenizer, questions, score, style, **options
        As for `answer_questions`.

    Returns
    -------
    pandas.DataFrame
        One row per position: ``accuracy`` where the right answer stands there, ``picked`` (share of
        picks among the questions that have this position), ``unbiased`` (what that share would be
        if the position did not matter), ``asked`` (rotations), and ``mean_accuracy`` over all
        rotations, the same in every row.
    """
    turned = [q.rotated(k) for q in questions for k in range(len(q.choices))]
    frame = answer_questions(model, tokenizer, turned, score=score, style=style, **options).frame
    frame["unbiased"] = 1 / frame.groupby("question")["choice"].transform("size")
    right = frame[frame["is_answer"]]
    table = frame.groupby("choice").agg(
        picked=("picked", "mean"), unbiased=("unbiased", "mean"), asked=("picked", "size")
    )
    table.insert(0, "accuracy", right.groupby("choice")["picked"].mean())
    table["mean_accuracy"] = right["picked"].mean()
    return table.rename_axis("position").reset_index()
