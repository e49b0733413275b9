"""Paired comparison of results: intervals, tests, Holm's correction, what is refused."""

from __future__ import annotations

import dataclasses
import tracemalloc
import warnings
from itertools import pairwise

import numpy as np
import pytest
from scipy import stats

import minigpt_lab as lab
from minigpt_lab.evaluation import windows
from minigpt_lab.evaluation.comparison import holm


def made(loss: np.ndarray, tokens: np.ndarray, **changes) -> lab.Perplexity:
    """A perplexity of given summed losses per passage."""
    table = np.stack([loss, tokens, 4.0 * tokens], axis=1)
    value = float(np.exp(loss.sum() / tokens.sum()))
    facts = {"seq_len": 64, "stride": 64, "text": "law", "content": "abc"} | changes
    return lab.Perplexity(value, 1.0, value, value, 1.0, 1.0, passages=table, **facts)


@pytest.fixture
def losses():
    rng = np.random.default_rng(0)
    tokens = rng.integers(50, 150, size=80).astype(float)
    base = tokens * rng.normal(3, 0.5, size=80)
    return tokens, base, base + tokens * rng.normal(0.05, 0.1, size=80)


def test_paired_difference_interval_and_test(losses):
    tokens, first, second = losses
    results = {"a": made(first, tokens), "b": made(second, tokens)}
    row = lab.compare(results).iloc[0]
    assert row["difference"] == pytest.approx((second - first).sum() / tokens.sum())
    assert row["low"] < row["difference"] < row["high"]
    # of about the size that a t-test of the passages' differences gives
    reference = stats.ttest_1samp(second - first, 0)
    assert 0.3 < row["p"] / max(reference.pvalue, 1e-4) < 3
    assert row["differ"] and row["unit"] == "nats per token"
    # the unpaired intervals overlap widely: pairing is what tells them apart
    assert abs(row["difference"]) < np.std(first / tokens) / np.sqrt(len(tokens))


def test_equal_models_are_not_told_apart(losses):
    """Of 200 pairs that differ by noise alone about one in twenty has p below 0.05."""
    tokens, first, _ = losses
    rng, p = np.random.default_rng(1), []
    for _ in range(200):
        noise = tokens * rng.normal(0, 0.1, size=80)
        results = {"a": made(first, tokens), "b": made(first + noise, tokens)}
        p.append(lab.compare(results, n_bootstrap=1, n_permutations=199)["p"].item())
    assert stats.binomtest(int((np.array(p) <= 0.05).sum()), 200, 0.05).pvalue > 0.001
    same = lab.compare({"a": made(first, tokens), "b": made(first, tokens)}).iloc[0]
    assert (same["difference"], same["p"], same["differ"]) == (0, 1, False)


def test_holm_against_its_definition():
    assert holm(np.array([0.01, 0.04, 0.03, 0.005])) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm(np.array([0.5, 0.9])) == pytest.approx([1.0, 1.0])


def test_pairs(losses):
    tokens, first, second = losses
    results = {"c": made(second * 1.2, tokens), "a": made(first, tokens), "b": made(second, tokens)}
    assert len(lab.compare(results)) == 3
    neighbours = lab.compare(results, pairs="neighbours")
    assert [*zip(neighbours["first"], neighbours["second"], strict=True)] == [*pairwise("abc")]
    against = lab.compare(results, reference="b")
    assert set(against["first"]) == {"b"} and set(against["second"]) == {"a", "c"}
    three = lab.compare(results)
    assert (three["p_holm"] >= three["p"]).all()
    assert (against["p_holm"] <= three["p_holm"].max()).all()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"text": "medicine"}, "text: law and medicine"),
        ({"seq_len": 128}, "seq_len: 64 and 128"),
        ({"stride": 32}, "stride: 64 and 32"),
        ({"chunked": True}, "chunked: False and True"),
        ({"precision": "bfloat16"}, "precision: float32 and bfloat16"),
    ],
)
def test_results_measured_differently_are_refused(losses, change, named):
    tokens, first, second = losses
    results = {"a": made(first, tokens), "b": made(second, tokens, **change)}
    with pytest.raises(ValueError, match=f"a and b differ in {named}; measure both"):
        lab.compare(results)


def test_other_results_are_refused(losses, tiny, tiny_domain):
    tokens, first, _ = losses
    with pytest.raises(ValueError, match="results are a; expected two or more of one kind"):
        lab.compare({"a": made(first, tokens)})
    with pytest.raises(ValueError, match=r"results\['b'\] is 3.2; expected a Perplexity"):
        lab.compare({"a": made(first, tokens), "b": 3.2})
    answers = lab.answer_questions(*tiny, tiny_domain.questions[:4], progress=False)
    with pytest.raises(ValueError, match="of one kind"):
        lab.compare({"a": made(first, tokens), "b": answers})
    with pytest.raises(ValueError, match="reference is 'c'; expected one of a, b"):
        lab.compare({"a": made(first, tokens), "b": made(first, tokens)}, reference="c")


def test_answers_are_compared_by_mcnemar(tiny, tiny_domain):
    answers = lab.answer_questions(*tiny, tiny_domain.questions[:30], progress=False)
    frame = answers.frame.copy()
    frame["picked"] = frame["choice"] == frame["choice"].groupby(frame["question"]).transform("max")
    other = dataclasses.replace(answers, frame=frame)
    row = lab.compare({"model": answers, "last choice": other}).iloc[0]
    expected = lab.compare_answers(answers, other)
    assert (row["difference"], row["low"], row["p"]) == (
        expected.difference, expected.low, expected.p)  # fmt: skip


def test_different_tokenizers_are_compared_per_character(losses):
    tokens, first, second = losses
    other = made(second, np.ceil(tokens / 2))
    other.passages[:, 2] = 4 * tokens
    row = lab.compare({"a": made(first, tokens), "b": other}).iloc[0]
    assert row["unit"] == "nats per character"
    assert row["difference"] == pytest.approx((second - first).sum() / (4 * tokens).sum())


def test_signs_that_undo_nothing_count_as_ties():
    """Six passages that all differ one way: p is 2 / 2⁶, in whatever order sums are rounded."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        tokens = rng.integers(5_000, 20_000, size=6).astype(float)
        first = 3 * tokens + rng.normal(size=6)
        second = first + rng.uniform(0.5, 2, size=6) * tokens
        results = {"a": made(first, tokens), "b": made(second, tokens)}
        row = lab.compare(results, n_bootstrap=1).iloc[0]
        assert row["p"] == pytest.approx(2 / 2**6, rel=0.3)


def test_per_character_each_loss_is_over_its_own_characters(losses):
    """A tokenizer whose windows leave out more characters does not look better for it."""
    tokens, first, _ = losses
    coarse = made(first, tokens)
    fine = dataclasses.replace(coarse, passages=0.9 * coarse.passages)  # reads a tenth less
    row = lab.compare({"a": coarse, "b": fine}).iloc[0]
    assert row["unit"] == "nats per character"
    assert row["difference"] == pytest.approx(0, abs=1e-9) and not row["differ"]


def test_passages_without_a_token_say_nothing(losses, tiny, tiny_domain):
    tokens, first, second = losses
    short = [np.pad(values[:3], (0, 4)) for values in (first, second, tokens)]
    results = {"a": made(short[0], short[2]), "b": made(short[1], short[2])}
    row = lab.compare(results).iloc[0]
    assert row["low"] < row["difference"] < row["high"]
    model, tokenizer = tiny
    texts = [tiny_domain.test[0], tiny_domain.test[1][:40], tiny_domain.test[2][:30]]
    found = lab.perplexity(model, tokenizer, texts, seq_len=64, chunked=True, progress=False)
    assert found.passages[:, 1].tolist() == [126, 0, 0]  # the rest is in the last, shorter window
    assert np.isnan([found.low, found.high]).all()  # as of a single passage


def test_whole_windows_of_other_lengths_of_one_text_are_not_compared(tiny, tiny_domain):
    text, how = [" ".join(tiny_domain.test[:6])], {"seq_len": 64, "chunked": True}
    a, b, same = (
        lab.perplexity(*tiny, text, max_tokens=n, progress=False, **how) for n in (128, 512, 128)
    )
    assert lab.compare({"a": a, "same": same})["p"].item() == 1
    with pytest.raises(ValueError, match="a and b are of different excerpts of .* characters"):
        lab.compare({"a": a, "b": b})


def test_neighbours_under_different_tokenizers_are_ordered_per_character(losses):
    tokens, first, _ = losses
    coarse, fine = made(first, tokens), made(1.1 * first, 2 * tokens)
    table = np.stack([1.1 * first, 2 * tokens, 4 * tokens], axis=1)  # low per token, not per letter
    results = {"worst": dataclasses.replace(fine, passages=table), "middle": coarse}
    results["best"] = made(0.9 * first, tokens)
    found = lab.compare(results, pairs="neighbours", n_bootstrap=1, n_permutations=9)
    assert found["first"].tolist() == ["best", "middle"]
    assert found["second"].tolist() == ["middle", "worst"]


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_losses_that_are_not_finite_are_refused(losses, value):
    """inf - inf is no difference: even two results of one model would be told apart."""
    tokens, first, _ = losses
    bad = np.where(np.arange(80) == 7, value, first)
    results = {"a": made(first, tokens), "b": made(bad, tokens)}
    with pytest.raises(
        ValueError, match=rf"results\['b'\] has a loss of {value} on passage 7 of law"
    ):
        lab.compare(results)


def test_many_pairs_get_more_random_signs(losses):
    """With 9,999 signs the least p of ten pairs would be 0.001 after the correction."""
    tokens, first, _ = losses
    results = {str(i): made((1 + i / 10) * first, tokens) for i in range(5)}
    table = lab.compare(results, level=0.001, n_bootstrap=1)
    assert len(table) == 10 and table["differ"].all()


@pytest.mark.parametrize(("passages", "enough"), [(4, False), (6, False), (8, True)])
def test_too_little_text_is_said(losses, passages, enough):
    """Of n passages that all differ one way p is 2 / 2ⁿ, of three pairs three times that."""
    tokens, first, _ = (values[:passages] for values in losses)
    results = {name: made(scale * first, tokens) for name, scale in (("a", 1), ("b", 2), ("c", 3))}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        table = lab.compare(results)
        lab.compare(results, n_permutations=1)  # for the intervals alone
    assert table["differ"].any() == enough
    expected = (
        "too little text to tell 3 pair(s) apart at level 0.05: give at least 7 passages "
        "(there are {})"
    )
    assert [str(each.message) for each in said] == [expected.format(passages)] * (not enough)


def test_resamples_are_drawn_in_blocks(losses, monkeypatch):
    """As if at once; of many passages without an array of all of them."""
    tokens, first, second = losses
    results = {"a": made(first, tokens), "b": made(second, tokens)}
    whole = lab.compare(results, seed=4).iloc[0]
    monkeypatch.setattr(windows, "_DRAWN", 1000)
    blocks = lab.compare(results, seed=4).iloc[0]
    assert blocks["p"] == whole["p"]
    assert (blocks["low"], blocks["high"]) == pytest.approx((whole["low"], whole["high"]))
    monkeypatch.undo()
    many = [np.tile(values, 80) for values in losses]
    results = {"a": made(many[1], many[0]), "b": made(many[2], many[0])}
    tracemalloc.start()
    lab.compare(results)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100 * 2**20  # 6,400 passages; an array of all signs alone would be 488 MiB
