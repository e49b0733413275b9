"""Which results differ by more than chance: paired, with intervals, corrected for their number."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pandas as pd

from ..checks import DictOf, Integer, Number, OneOf, Text, checked, invalid
from .answers import Answers, compare_answers
from .language import Perplexity
from .predictions import Divergence
from .windows import drawn, require_same, resampled

_PAIRS = ("all", "neighbours")


@checked(
    results=DictOf(Text()),
    pairs=OneOf(_PAIRS),
    reference=Text() | None,
    level=Number(above=0, below=1),
    n_bootstrap=Integer(1),
    n_permutations=Integer(1) | None,
    seed=Integer(0),
)
def compare(
    results: Mapping[str, Perplexity | Divergence | Answers],
    *,
    pairs: str = "all",
    reference: str | None = None,
    level: float = 0.05,
    n_bootstrap: int = 2000,
    n_permutations: int | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Paired differences between results on the same text or questions, Holm-corrected.

    Of perplexities the difference is that of the mean loss per token (in nats; its exponential is
    the ratio of the perplexities), of answers that of the accuracy. Losses under different
    tokenizers are compared per character. Passages count as independent, also those of one
    document: resampled by whole documents, the intervals on the test parts here are 1.0 to 1.4
    times as wide (medicine about 1.2).

    Parameters
    ----------
    results : mapping
        Names to results of `perplexity`, `divergence`, `answer_questions` or `write_answers`, all
        of one kind.
    pairs : {"all", "neighbours"}
        Every pair, or those that stand beside each other from best to worst.
    reference : str, optional
        A name in `results`: only the pairs of it with every other one.
    level : float
        Level of significance after the correction.
    n_bootstrap, n_permutations, seed : int
        Resamples of the intervals, random signs of the test, and their seed. By default 9,999
        random signs, more for many pairs: the least p is one over their number plus one.

    Returns
    -------
    pandas.DataFrame
        One row per pair: ``first, second``, ``difference`` (second less first), ``low, high`` (95 %
        interval: bootstrap over passages; Newcombe's for answers), ``p`` (each passage's results
        exchanged at random; exact McNemar for answers), ``p_holm`` (corrected for all rows; Holm
        1979), ``differ`` (whether that is below `level`), ``unit``. Of *n* passages or questions p
        is at least ``2^(1 - n)``; a warning says if they are too few for any pair to differ.

    Raises
    ------
    ValueError
        If two results are of different texts, questions, protocols or precisions, a loss is not
        finite, there are fewer than two, or `reference` is none of them.
    """
    if reference is not None and reference not in results:
        raise invalid("reference", reference, f"one of {', '.join(results) or 'none'}")
    options: dict[str, Any] = {"n_bootstrap": n_bootstrap, "n_permutations": n_permutations}
    table = paired_differences(results, pairs, reference, level=level, seed=seed, **options)
    return corrected(table, level, n_permutations)


def paired_differences(
    results: Mapping[str, Perplexity | Divergence | Answers],
    pairs: str,
    reference: str | None = None,
    *,
    level: float = 0.05,
    n_bootstrap: int = 2000,
    n_permutations: int | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """The table of `compare` before any correction, with ``n``: passages or questions."""
    given = {name: _paired(name, result) for name, result in results.items()}
    if len(given) < 2 or len({type(result) for result in given.values()}) > 1:
        raise ValueError(
            f"results are {', '.join(results) or 'none'}; expected two or more of one kind, from "
            "lab.perplexity, lab.divergence or lab.answer_questions"
        )
    rows, chosen = [], _chosen(given, pairs, reference)
    if n_permutations is None:  # the least p after the correction is half the level
        n_permutations = max(9_999, math.ceil(2 * len(chosen) / level))
    for first, second in chosen:
        one, other = given[first], given[second]
        if isinstance(one, Answers):
            row = _answers_row(one, other)
        else:
            require_one_protocol(one, other, f"{first} and {second}")
            row = _loss_row(one, other, n_bootstrap, n_permutations, seed)
        rows.append({"first": first, "second": second, **row})
    return pd.DataFrame(rows)


def corrected(table: pd.DataFrame, level: float, n_permutations: int | None = None) -> pd.DataFrame:
    """Correct the p of all rows of `paired_differences` for their number (Holm 1979).

    Warns if there are too few passages or questions for any row to differ, unless the random signs
    that were asked for are too few too: then only the intervals matter.
    """
    pairs, n = len(table), table["n"].min()
    signs_suffice = n_permutations is None or pairs / (1 + n_permutations) < level
    if signs_suffice and pairs * 2.0 ** (1 - n) >= level:
        items = "questions" if (table["unit"] == "accuracy").all() else "passages"
        warnings.warn(
            f"too little text to tell {pairs} pair(s) apart at level {level:g}: give at least "
            f"{2 + math.floor(math.log2(pairs / level))} {items} (there are {n})",
            stacklevel=4,
        )
    table = table.drop(columns="n")
    table.insert(6, "p_holm", holm(table["p"].to_numpy()))
    table.insert(7, "differ", table["p_holm"] < level)
    return table


def _paired(name: str, result: object) -> Any:
    """A result that can be compared; of a divergence, the model's perplexity."""
    if isinstance(result, Divergence):
        result = result.model
    if not isinstance(result, Perplexity | Answers):
        raise invalid(f"results[{name!r}]", result, "a Perplexity, a Divergence or Answers")
    if isinstance(result, Perplexity):
        losses = result.passages[:, 0]
        if len(bad := np.flatnonzero(~np.isfinite(losses))):
            raise ValueError(
                f"results[{name!r}] has a loss of {losses[bad[0]]} on passage {bad[0]} of "
                f"{result.text}; only finite losses can be compared: measure in float32, or "
                "without this passage"
            )
    return result


def _chosen(results: Mapping, pairs: str, reference: str | None) -> list[tuple[str, str]]:
    """Names of the pairs that are compared."""
    if reference is not None:
        return [(reference, name) for name in results if name != reference]
    if pairs == "all":
        return [*combinations(results, 2)]

    def badness(name: str) -> float:
        if isinstance(found := results[name], Answers):
            return -found.accuracy
        loss, _, characters = found.passages.sum(0)
        return loss / characters  # the order of perplexities, but under different tokenizers too

    return [*pairwise(sorted(results, key=badness))]


def _answers_row(first: Answers, second: Answers) -> dict:
    """Difference of two accuracies."""
    found = compare_answers(first, second)
    numbers = {"difference": found.difference, "low": found.low, "high": found.high}
    return {**numbers, "p": found.p, "unit": "accuracy", "n": found.items}


def require_one_protocol(first: Perplexity, second: Perplexity, names: str) -> None:
    """Refuse losses of other passages, windows or precision."""
    for what in ("text", "seq_len", "stride", "chunked", "precision"):
        require_same(what, getattr(first, what), getattr(second, what), names)
    if first.content != second.content:
        counts = [f"{int(each.passages[:, 2].sum()):,} characters" for each in (first, second)]
        raise ValueError(
            f"{names} are of different excerpts of {first.text} ({' and '.join(counts)}); measure "
            "both with the same max_tokens and max_characters"
        )


def _loss_row(
    first: Perplexity, second: Perplexity, n_bootstrap: int, n_permutations: int, seed: int
) -> dict:
    """Difference of two mean losses on the same passages."""
    same_tokens = np.array_equal(first.passages[:, 1], second.passages[:, 1])
    columns = [0, 1 if same_tokens else 2]  # loss, and tokens or characters
    table = np.hstack([first.passages[:, columns], second.passages[:, columns]])  # [passage, 4]
    low, high = resampled(table, _difference, n_bootstrap, seed)[:, 0]
    # With no difference between the models, each passage's two results may as well be exchanged.
    exchanged = table[:, [2, 3, 0, 1]]
    mean, half = ((table + exchanged) / 2).sum(0), (table - exchanged) / 2
    rng = np.random.default_rng(seed)
    signs = drawn(lambda size: rng.choice([-1.0, 1.0], size=size), n_permutations, len(table))
    sums = mean + np.concatenate([each @ half for each in signs])  # [permutation, 4]
    found = _difference(sums.T)[0]
    difference = float(_difference(table.sum(0))[0])
    # Sums in another order are not equal to the last bit: what is within rounding counts as a tie.
    rounding = 1e-12 * table[:, [0, 2]].sum() / table[:, 1].sum()
    extreme = np.abs(found) >= abs(difference) - rounding
    return {
        "difference": difference,
        "low": float(low),
        "high": float(high),
        "p": float((1 + extreme.sum()) / (1 + n_permutations)),
        "unit": "nats per token" if same_tokens else "nats per character",
        "n": int(table.any(1).sum()),
    }


def _difference(sums: np.ndarray) -> np.ndarray:
    """Second mean loss less the first, of sums: loss and tokens (characters) of both ``[4, …]``."""
    loss, n, loss_second, n_second = sums
    return (loss_second / n_second - loss / n)[None]


def holm(p: np.ndarray) -> np.ndarray:
    """Holm's correction (1979) of p-values: ``max_{j ≤ i} min(1, (m - j + 1) p_(j))``."""
    order = np.argsort(p)
    factors = len(p) - np.arange(len(p))
    corrected = np.maximum.accumulate(np.minimum(1, factors * p[order]))
    return corrected[np.argsort(order)]
