"""Trimmed tokenizers: any text still encodes, kept words encode as before."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import random_model
from hypothesis import given, settings
from hypothesis import strategies as st

import minigpt_lab as lab
from minigpt_lab.vocabulary import close_over_merges, merge_table, protected_tokens


@pytest.fixture(scope="module")
def words(tiny):
    return tiny[1]


def kept_tokens(words, seed: int) -> list[int]:
    """A random quarter of the vocabulary, closed as a plan closes it."""
    mask = np.random.default_rng(seed).random(len(words)) < 0.25
    mask[protected_tokens(words)] = True
    return np.flatnonzero(close_over_merges(mask, merge_table(words))).tolist()


@settings(max_examples=30, deadline=None)
@given(text=st.text(max_size=60), seed=st.integers(0, 5))
def test_any_text_round_trips(text, seed, words):
    trimmed = lab.trim_tokenizer(words, kept_tokens(words, seed))
    assert trimmed.decode(trimmed(text)["input_ids"]) == text


def test_text_of_kept_tokens_encodes_as_before(words, tiny_domain):
    text = " ".join(tiny_domain.calibration[:5])
    ids = words(text)["input_ids"]
    mask = np.zeros(len(words), bool)
    mask[[*ids, *protected_tokens(words)]] = True
    kept = np.flatnonzero(close_over_merges(mask, merge_table(words)))
    trimmed = lab.trim_tokenizer(words, kept)
    assert kept[trimmed(text)["input_ids"]].tolist() == ids
    assert len(trimmed) == len(kept)
    assert trimmed.eos_token_id == list(kept).index(words.eos_token_id)


def test_closure_adds_every_ancestor(words):
    merges = merge_table(words)
    mask = np.zeros(len(words), bool)
    mask[merges[-1, 2]] = True
    closed = close_over_merges(mask, merges)
    for left, right, result in merges:
        assert not closed[result] or (closed[left] and closed[right])


def test_masked_and_shrunk_take_the_same_original_tokenizer(tiny, tiny_domain, tiny_statistics):
    model, tokenizer = tiny
    plan = lab.contextual_plan(model, tiny_statistics, epsilon_embedding=0.0)
    with lab.masked(model, plan):
        masked = lab.perplexity(model, tokenizer, tiny_domain.test, 64, max_tokens=512)
    mini = lab.shrink(model, plan)
    shrunk = lab.perplexity(mini, tokenizer, tiny_domain.test, 64, max_tokens=512)
    assert shrunk.value == pytest.approx(masked.value, rel=1e-4)
    assert isinstance(lab.generate(mini, tokenizer, "The court"), str)


def test_a_vocabulary_can_be_cut_twice(tmp_path, tiny, tiny_domain, tiny_statistics):
    """Every tokenizer of the way fits: the original, the first trimmed, and the reloaded one."""
    model, tokenizer = tiny
    counts = lab.count_tokens(tiny_domain.calibration, tokenizer)
    first = lab.contextual_plan(model, tiny_statistics, epsilon_embedding=0.0, token_counts=counts)
    folder = lab.save_model(lab.shrink(model, first), tokenizer, tmp_path / "once")
    once, trimmed = lab.load_model(folder, device="cpu")
    batches = lab.tokenize(tiny_domain.calibration, trimmed, 64, 512)
    found = lab.collect_statistics(once, batches, progress=False)
    second = lab.contextual_plan(once, found, epsilon_embedding=0.0)
    text = lab.excerpt(tiny_domain.test, tokenizer, 400)
    twice = lab.shrink(once, second)
    assert len(twice.get_input_embeddings().weight) < len(trimmed) < len(tokenizer)
    with lab.masked(once, second):
        values = [lab.perplexity(once, t, text, 64) for t in (tokenizer, trimmed)]
    own = lab.tokenizer_for(twice, tokenizer)
    for words in (tokenizer, trimmed, own):
        values.append(lab.perplexity(twice, words, text, 64))
    assert [v.value for v in values] == pytest.approx([values[0].value] * 5, rel=1e-4)
    with pytest.raises(ValueError, match="do not belong together"):
        lab.perplexity(once, own, text, 64)


def test_counts_decide_what_leaves(tiny, tiny_domain, tiny_statistics):
    model, tokenizer = tiny
    counts = lab.count_tokens(tiny_domain.calibration, tokenizer)
    short = lab.contextual_plan(model, tiny_statistics, epsilon_embedding=0.0)
    long = lab.contextual_plan(model, tiny_statistics, epsilon_embedding=0.0, token_counts=counts)
    assert set(np.flatnonzero(counts)) <= set(long.vocabulary)
    assert len(short.vocabulary) < len(long.vocabulary) < 1024
    rare = lab.contextual_plan(model, tiny_statistics, epsilon_embedding=0.01, token_counts=counts)
    assert len(rare.vocabulary) < len(short.vocabulary)


def test_a_foreign_tokenizer_is_refused(tiny, tiny_domain):
    with pytest.raises(ValueError, match="do not belong together"):
        lab.perplexity(random_model("llama"), tiny[1], tiny_domain.test, 32)
