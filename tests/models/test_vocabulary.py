"""Trimmed tokenizers: any text still encodes, kept words encode as before."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from helpers import random_model
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_kinds import TEXT, model_of, tokenizer_of
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import minigpt_lab as lab
from minigpt_lab.models import close_over_merges, merge_table, protected_tokens


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
        masked = lab.perplexity(model, tokenizer, tiny_domain.test, seq_len=64, max_tokens=512)
    mini = lab.shrink(model, plan)
    shrunk = lab.perplexity(mini, tokenizer, tiny_domain.test, seq_len=64, max_tokens=512)
    assert shrunk.value == pytest.approx(masked.value, rel=1e-4)
    assert isinstance(lab.generate(mini, tokenizer, "The court"), str)


def test_a_vocabulary_can_be_cut_twice(tmp_path, tiny, tiny_domain, tiny_statistics):
    """Every tokenizer of the way fits: the original, the first trimmed, and the reloaded one."""
    model, tokenizer = tiny
    counts = lab.count_tokens(tiny_domain.calibration, tokenizer)
    first = lab.contextual_plan(model, tiny_statistics, epsilon_embedding=0.0, token_counts=counts)
    folder = lab.save_model(lab.shrink(model, first), tokenizer, tmp_path / "once")
    once, trimmed = lab.load_model(folder, device="cpu")
    batches = lab.tokenize(tiny_domain.calibration, trimmed, seq_len=64, max_tokens=512)
    found = lab.collect_statistics(once, batches, progress=False)
    second = lab.contextual_plan(once, found, epsilon_embedding=0.0)
    text = lab.excerpt(tiny_domain.test, tokenizer, max_tokens=400)
    twice = lab.shrink(once, second)
    assert len(twice.get_input_embeddings().weight) < len(trimmed) < len(tokenizer)
    with lab.masked(once, second):
        values = [lab.perplexity(once, t, text, seq_len=64) for t in (tokenizer, trimmed)]
    own = lab.tokenizer_for(twice, tokenizer)
    for words in (tokenizer, trimmed, own):
        values.append(lab.perplexity(twice, words, text, seq_len=64))
    assert [v.value for v in values] == pytest.approx([values[0].value] * 5, rel=1e-4)
    with pytest.raises(ValueError, match="do not belong together"):
        lab.perplexity(once, own, text, seq_len=64)


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
        lab.perplexity(random_model("llama"), tiny[1], tiny_domain.test, seq_len=32)


BYTE_PAIRS = ("byte-level", "prefix space", "full stop and newlines", "one word")


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("kind", BYTE_PAIRS)
def test_kept_tokens_are_those_of_the_dense_tokenizer(kind, bos, tiny_domain):
    dense, text = tokenizer_of(kind, bos), "\n\n".join([*tiny_domain.test[:3], "Ünïcode 😀 ."])
    ids = dense(text)["input_ids"]
    everything = lab.trim_tokenizer(dense, range(len(dense)))
    assert everything(text)["input_ids"] == ids
    mask = np.zeros(len(dense), bool)
    mask[[*ids, *protected_tokens(dense)]] = True
    kept = np.flatnonzero(close_over_merges(mask, merge_table(dense)))
    trimmed = lab.trim_tokenizer(dense, kept)
    assert len(trimmed) == len(kept) < len(dense)
    assert kept[trimmed(text)["input_ids"]].tolist() == ids


@pytest.mark.parametrize(
    "marks", [{"continuing_subword_prefix": "##"}, {"end_of_word_suffix": "_"}]
)
def test_words_whose_parts_are_marked(marks, tiny_domain):
    made = Tokenizer(models.BPE(**marks, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=300, special_tokens=["?"], **marks)
    )
    dense, text = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="?"), tiny_domain.test[0]
    merges = merge_table(dense)
    assert len(merges) == 300 - len(protected_tokens(dense))
    ids = dense(text)["input_ids"]
    mask = np.zeros(len(dense), bool)
    mask[[*ids, *protected_tokens(dense)]] = True
    kept = np.flatnonzero(close_over_merges(mask, merges))
    assert len(kept) < len(dense)
    assert kept[lab.trim_tokenizer(dense, kept)(text)["input_ids"]].tolist() == ids


@pytest.mark.parametrize("kind", ["Unigram", "WordPiece", "characters", "Python"])
def test_what_cannot_be_trimmed_is_named(kind, tiny_domain):
    tokenizer, words = tokenizer_of(kind), "the vocabulary of .* cannot be trimmed; expected byte"
    model = model_of(tokenizer)
    batches = lab.tokenize(tiny_domain.calibration, tokenizer, seq_len=24, max_tokens=240)
    found = lab.collect_statistics(model, batches, progress=False)
    with pytest.raises(ValueError, match=words):
        lab.trim_tokenizer(tokenizer, range(9))
    with pytest.raises(ValueError, match=words):
        lab.contextual_plan(model, found, epsilon_embedding=0.0, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="Unigram, WordPiece and word-level .* cannot be trimmed"):
        lab.contextual_plan(model, found, epsilon_embedding=0.0)


def test_a_special_token_without_a_row_is_no_obstacle(tiny, tiny_domain, tiny_statistics, tmp_path):
    """Gemma 3's tokenizer has one for images, and the text models no row for it."""
    model, own = tiny
    tokenizer = copy.deepcopy(own)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<image>"], "pad_token": "<padding>"})
    assert len(tokenizer) == len(own) + 2
    counts = lab.count_tokens(tiny_domain.train, tokenizer)
    plans = []
    for words in (own, tokenizer):
        batches = lab.tokenize(tiny_domain.calibration, words, seq_len=64, max_tokens=512)
        found = lab.collect_statistics(model, batches, progress=False)
        for options in ({}, {"token_counts": counts}, {"token_counts": counts, "tokenizer": words}):
            plans.append(lab.contextual_plan(model, found, epsilon_embedding=0.0, **options))
    assert [plan.vocabulary for plan in plans[:3]] == [plan.vocabulary for plan in plans[3:]]
    mini = lab.shrink(model, plans[-1])
    reloaded = lab.load_model(lab.save_model(mini, tokenizer, tmp_path / "mini"), device="cpu")
    for subject in (model, mini):
        one, other = (
            lab.perplexity(subject, words, tiny_domain.test, seq_len=64)
            for words in (own, tokenizer)
        )
        assert one == other
    assert lab.perplexity(*reloaded, tiny_domain.test, seq_len=64).value == pytest.approx(
        other.value
    )
    assert len(reloaded[1]) == len(mini.get_input_embeddings().weight)
    for call in (lab.perplexity, lab.generate):
        with pytest.raises(ValueError, match="uses a special token that this model has no row for"):
            call(model, tokenizer, "A picture of a court: <image>")


def test_a_model_may_have_many_more_rows(tiny_domain):
    """A vocabulary of characters under a config's default size; not a foreign tokenizer."""
    words = copy.deepcopy(tokenizer_of("characters"))
    model = model_of(tokenizer_of("byte-level"))
    assert lab.perplexity(model, words, tiny_domain.test[:2], seq_len=24).tokens > 100
    words.name_or_path, model.config._name_or_path = "somewhere", "elsewhere"
    with pytest.raises(ValueError, match="do not belong together"):
        lab.tokenizer_for(model, words)


@pytest.mark.parametrize("kept", [[], [3, 3], [5, 4], [-1], None, "12"])
def test_kept_tokens_are_checked(words, kept):
    with pytest.raises(ValueError, match="kept is "):
        lab.trim_tokenizer(words, kept)
