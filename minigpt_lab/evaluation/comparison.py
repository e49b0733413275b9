"""Which results differ by more than chance: paired, with intervals, corrected for their number."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pandas as pd

from ..checks import DictOf, Integer, Number, OneOf, Text, checked, invalid
from .answers import Answers, compare_answers
from .language import Perplexity
from .predictions import Divergence
from .windows import require_same, resampled

_PAIRS = ("all", "neighbours")


@checked(
    results=DictOf(Text()),
    pairs=OneOf(_PAIRS),
    reference=Text() | None,
    level=Number(above=0, below=1),
    n_bootstrap=Integer(1),
    n_permutations=Integer(1),
    seed=Integer(0),
)
def compare(
    results: Mapping[str, Perplexity | Divergence | Answers],
    *,
    pairs: str = "all",
    reference: str | None = None,
    level: float = 0.05,
    n_bootstrap: int = 2000,
    n_permutations: int = 9999,
    seed: int = 0,
) -> pd.DataFrame:
    """Paired differences between results on the same text or questions, Holm-corrected.

    Of perplexities the difference is that of the mean loss per token (in nats; its exponential is
    the ratio of the perplexities), of answers that of the accuracy. Losses under different
    tokenizers are compared per character.

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
        Resamples of the intervals, random signs of the test, and their seed.

    Returns
    -------
    pandas.DataFrame
        One row per pair: ``first, second``, ``difference`` (second less first), ``low, high`` (95 %
        interval: bootstrap over passages; Newcombe's for answers), ``p`` (each passage's results
        exchanged at random; exact McNemar for answers), ``p_holm`` (corrected for all rows; Holm
        1979), ``differ`` (whether that is below `level`), ``unit``.

    Raises
    ------
    ValueError
        If two results are of different texts, questions, protocols or precisions, a loss is not
        finite, there are fewer than two, or `reference` is none of them.
    """
    given = {name: _paired(name, result) for name, result in results.items()}
    if len(given) < 2 or len({type(result) for result in given.values()}) > 1:
        raise ValueError(
            f"results are {', '.join(results) or 'none'}; expected two or more of one kind, from "
            "lab.perplexity, lab.divergence or lab.answer_questions"
        )
    if reference is not None and reference not in results:
        raise invalid("reference", reference, f"one of {', '.join(results)}")
    rows = []
    for first, second in _chosen(given, pairs, reference):
        one, other = given[first], given[second]
        if isinstance(one, Answers):
            row = _answers_row(one, other)
        else:
            _require_one_protocol(one, other, f"{first} and {second}")
            row = _loss_row(one, other, n_bootstrap, n_permutations, seed)
        rows.append({"first": first, "second": second, **row})
    table = pd.DataFrame(rows)
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
    return {**numbers, "p": found.p, "unit": "accuracy"}


def _require_one_protocol(first: Perplexity, second: Perplexity, names: str) -> None:
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
    mean, half = (table + exchanged) / 2, (table - exchanged) / 2
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(n_permutations, len(table)))
    found = _difference(mean.sum(0)[:, None] + (signs @ half).T)[0]  # [permutation]
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
