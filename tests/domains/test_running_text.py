"""Text is encoded as a model sees it, whatever the tokenizer: joined first, cut after."""

from __future__ import annotations

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_kinds import KINDS, model_of, tokenizer_of
from tokenizers.processors import TemplateProcessing
from transformers import GenerationConfig

import minigpt_lab as lab
from minigpt_lab.domains.running import running_text, token_ids, window_prefix
from minigpt_lab.evaluation.continuations import pack

ODD = (
    "Hello – “naïve” 😀😀 world.", "", "  two spaces first", "日本語のテキスト。", "a space last ",
    "x", "½ cup of ﬁne flour", "\nits own\n\nblank line", "İstanbul e\u0301 \u00a0 nbsp",
    "The court. ",
)  # fmt: skip
LAW = tuple(lab.load_domain("tiny-law").test)


@pytest.fixture(params=itertools.product(KINDS, [False, True]), ids="{0[0]}, {0[1]}".format)
def words(request):
    """A tokenizer of every kind, that begins texts with a token of its own or not."""
    return tokenizer_of(*request.param)


def whole(texts, words) -> list[int]:
    """Ids of the joined text, by the tokenizer alone."""
    return words("\n\n".join(texts), add_special_tokens=False, verbose=False)["input_ids"]


def losses(model, ids: list[int]) -> list[float]:
    """Losses of tokens 1… of one row, by themselves."""
    row = torch.tensor([ids])
    with torch.no_grad():
        logits = model(input_ids=row).logits[0, :-1].float()
    return torch.nn.functional.cross_entropy(logits, row[0, 1:], reduction="none").tolist()


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_tokens_are_those_of_the_joined_text(kind, data):
    words = tokenizer_of(kind)
    passage = st.one_of(st.sampled_from([*ODD, *LAW[:4]]), st.text("ab .\n\tTé日😀", max_size=20))
    texts = data.draw(st.lists(passage, min_size=1, max_size=8))
    ids, found = whole(texts, words), running_text(texts, words)
    assert found.ids == ids == token_ids(texts, words)
    assert len(found.passage) == len(found.characters) == len(ids)
    assert (np.diff(found.passage) >= 0).all() and set(found.passage) <= set(range(len(texts)))
    assert (found.characters >= 0).all()
    assert found.characters.sum() == (len("\n\n".join(texts)) if ids else 0)
    assert np.array_equal(
        lab.count_tokens(texts, words), np.bincount(ids, minlength=len(words)).astype(int)
    )
    if len(ids) > 1:
        limit = data.draw(st.integers(1, len(ids)))
        part = running_text(texts, words, limit)
        assert part.ids == ids[:limit] and np.array_equal(part.passage, found.passage[:limit])
        assert np.array_equal(part.characters, found.characters[:limit])


@pytest.mark.parametrize("kind", ["byte-level", "full stop and newlines", "characters"])
def test_a_token_counts_with_the_passage_that_it_begins_in(kind):
    words = tokenizer_of(kind)
    unknown = "?" if kind == "characters" else "a"  # it has no a
    texts = [x.replace("a", unknown) for x in (*LAW[:4], "The end.", "Then:", "The law", "It")]
    found = running_text(texts, words)
    pieces = [words.decode([token]) for token in found.ids]
    assert "".join(pieces) == "\n\n".join(texts)
    begins = np.cumsum([0, *(len(passage) + 2 for passage in texts[:-1])])
    starts = np.cumsum([0, *map(len, pieces[:-1])])
    assert np.array_equal(found.passage, np.searchsorted(begins, starts, side="right") - 1)
    assert np.array_equal(np.bincount(found.passage, found.characters)[:-1], np.diff(begins))


def test_a_tokenizer_without_offsets_tells_the_passage_to_a_few_tokens():
    words = tokenizer_of("Python")
    texts = [text.replace("a", "<unk>") for text in (*LAW[:4], *LAW[:4], "Then:", "The law", "It")]
    found = running_text(texts, words)
    pieces = [words.decode([token]) for token in found.ids]
    assert "\n\nT" in pieces and "".join(pieces) == "\n\n".join(texts)  # one reaches over
    begins = np.cumsum([0, *(len(passage) + 2 for passage in texts[:-1])])
    starts = np.cumsum([0, *map(len, pieces[:-1])])
    exact = np.searchsorted(begins, starts, side="right") - 1
    assert (found.passage != exact).sum() <= 2 * len(texts)


def test_a_budget_reads_no_more_text_than_it_needs(words, monkeypatch):
    texts, read = LAW * 30, []
    plain = type(words).__call__

    def counting(self, text, **options):
        read.append(len(text))
        return plain(self, text, **options)

    ids = whole(texts, words)
    monkeypatch.setattr(type(words), "__call__", counting)
    batches = lab.tokenize(texts, words, seq_len=32, max_tokens=256)
    windows = torch.cat([batch["input_ids"] for batch in batches])
    prefix = window_prefix(words)
    assert windows[:, len(prefix) :].flatten().tolist() == ids[: 8 * (32 - len(prefix))]
    assert windows[:, : len(prefix)].tolist() == [prefix] * 8
    chosen = lab.excerpt(texts, words, max_tokens=900)
    assert sum(read) < len("\n\n".join(texts)) / 3
    monkeypatch.undo()
    assert chosen == texts[: len(chosen)] and len(whole(chosen, words)) <= 900
    assert len(whole(texts[: len(chosen) + 1], words)) > 900


def test_half_a_character_becomes_the_sign_for_none(words):
    """JSON may hold one: an emoji cut in two. No tokenizer takes it."""
    text, whole_text = f"The court {chr(0xD83D)} held", "The court \ufffd held"
    with pytest.raises(ValueError, match="half of a character, in .*; expected characters"):
        token_ids([text, "x"], words)
    for batch, other in zip(
        lab.tokenize(text, words, seq_len=4),
        lab.tokenize(whole_text, words, seq_len=4),
        strict=True,
    ):
        assert torch.equal(batch["input_ids"], other["input_ids"])
    model = model_of(words)
    assert (
        lab.perplexity(model, words, text).value == lab.perplexity(model, words, whole_text).value
    )
    assert lab.generate(model, words, text, max_new_tokens=2) == lab.generate(
        model, words, whole_text, max_new_tokens=2
    )
    assert lab.Question("The", (text, "b"), 0).choices[0] == whole_text


def test_what_stands_before_every_text(words):
    """Also without an a in the vocabulary, and without a name for the token."""
    around = words("")["input_ids"]
    assert window_prefix(words) == around  # these tokenizers put nothing behind
    text = LAW[0]
    assert words(text)["input_ids"] == window_prefix(words) + token_ids(text, words)


def test_nothing_stands_before_a_text_that_a_token_ends():
    words = copy.deepcopy(tokenizer_of("WordPiece"))
    ends = {token: words.convert_tokens_to_ids(token) for token in ("[CLS]", "[SEP]")}
    for template, wanted in (("$A [SEP]", []), ("[CLS] $A [SEP]", [ends["[CLS]"]])):
        words.backend_tokenizer.post_processor = TemplateProcessing(
            single=template, special_tokens=list(ends.items())
        )
        assert window_prefix(words) == wanted


def test_perplexity_by_hand(words):
    model, prefix, texts = model_of(words), window_prefix(words), [*LAW[:3], *ODD]
    ids, step = whole(texts, words), 24 - len(prefix)
    rows = [prefix + ids[start : start + step] for start in range(0, len(ids), step)]
    wanted = [losses(model, row)[max(0, len(prefix) - 1) :] for row in rows if len(row) > 1]
    total = sum(itertools.chain(*wanted))
    found = lab.perplexity(model, words, texts, seq_len=24, max_characters=None, batch_size=3)
    assert found.tokens == sum(map(len, wanted)) == found.passages[:, 1].sum()
    assert found.value == pytest.approx(math.exp(total / found.tokens), rel=1e-4)
    assert found.characters == found.passages[:, 2].sum() <= len("\n\n".join(texts))
    if prefix:  # all of the text is scored
        assert found.characters == len("\n\n".join(texts)) and found.tokens == len(ids)
    row = found.row()
    bits = math.log2(row["perplexity"]) * row["tokens"] / row["characters"]
    assert row["bits_per_character"] == pytest.approx(bits, rel=1e-12)


def test_chunks_are_those_of_the_papers_code(words):
    model, texts = model_of(words), LAW[:5]
    stream = words("\n\n".join(texts), verbose=False)["input_ids"]  # with what begins a text, once
    count = len(stream) // 24
    wanted = np.mean([losses(model, stream[24 * i :][:24]) for i in range(count)])
    found = lab.perplexity(model, words, texts, seq_len=24, chunked=True)
    assert found.tokens == count * 23 and found.value == pytest.approx(math.exp(wanted), rel=1e-4)
    assert "whole windows only" in found.protocol
    two = lab.perplexity(model, words, texts, seq_len=24, chunked=True, max_tokens=50)
    assert two.tokens == 2 * 23
    with pytest.raises(ValueError, match="at least 24 are needed"):
        lab.perplexity(model, words, "x", seq_len=24, chunked=True)


def test_generation_is_greedy_whatever_the_folder_says(words):
    model, prompt = model_of(words), "The court held that"
    ids = window_prefix(words) + whole([prompt], words)
    row = list(ids)
    with torch.no_grad():
        for _ in range(12):
            row.append(model(input_ids=torch.tensor([row])).logits[0, -1].argmax().item())
    text = words.decode(row, skip_special_tokens=True)
    before = words.decode(ids, skip_special_tokens=True)
    assert text.startswith(before)
    hostile = GenerationConfig(
        num_beams=3, repetition_penalty=5.0, no_repeat_ngram_size=1, min_new_tokens=9,
        do_sample=True, suppress_tokens=[row[len(ids)]], forced_eos_token_id=3, max_length=5,
        num_return_sequences=2, temperature=2.0, top_k=3, length_penalty=3.0, early_stopping=True,
        bad_words_ids=[[row[-1]]],
    )  # fmt: skip
    for config in (model.generation_config, hostile, None):
        model.generation_config = config
        model.config.num_beams = model.config.repetition_penalty = 3  # as before generation configs
        assert lab.generate(model, words, prompt, max_new_tokens=12) == text[len(before) :]
        assert model.generation_config is config


def test_a_choice_is_encoded_with_its_prompt(words):
    question = lab.Question("The court held that the", ("case was closed.", ", and", "law"), 0)
    prompt, follows = question.question, question.choices
    found = pack(prompt, follows, words, 60)
    for follow, branch, start in zip(follows, found.branches, found.starts, strict=True):
        ids = words(f"{prompt} {follow}", verbose=False)["input_ids"]
        assert found.ids[: found.shared] + found.ids[branch] == ids
        before = window_prefix(words) + whole([prompt], words)
        own = len(ids) - (branch.stop - start)
        assert ids[:own] == before[:own] and ids[: own + 1] != before[: own + 1]
    answers = lab.answer_questions(model_of(words), words, [question])
    assert answers.n == 1


def test_everything_else_works_with_it_too(words, tiny_domain):
    model = model_of(words)
    batches = lab.tokenize(tiny_domain.calibration, words, seq_len=24, max_tokens=480)
    found = lab.collect_statistics(model, batches, progress=False)
    mini = lab.shrink(model, lab.contextual_plan(model, found, quantile=0.2))
    assert lab.perplexity(mini, words, tiny_domain.test, seq_len=24, max_tokens=300).tokens > 100
    assert (
        lab.efficiency(mini, words, dense=model, seq_len=8, new_tokens=2, repeats=1).shape[0] == 2
    )
    assert tiny_domain.summary(words)["tokens"].iloc[-1] == len(whole(tiny_domain.test, words))
