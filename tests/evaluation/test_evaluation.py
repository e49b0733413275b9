"""Perplexity against the definition, its protocol, and its interval."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch

import minigpt_lab as lab
from minigpt_lab.checks import InvalidArgument
from minigpt_lab.evaluation import language


def test_one_window_equals_the_models_own_loss(tiny, tiny_domain):
    model, tokenizer = tiny
    text = tiny_domain.test[0]
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss.item()
    found = lab.perplexity(model, tokenizer, text, seq_len=256)
    assert found.tokens == ids.shape[1] - 1
    assert found.value == pytest.approx(math.exp(loss), rel=1e-5)
    bits = loss * found.tokens / math.log(2)
    characters = len(tokenizer.decode(ids[0, 1:]))  # of the tokens scored
    assert found.characters == characters
    assert found.bits_per_character == pytest.approx(bits / characters, rel=1e-5)


def test_windows_are_scored_once_each_and_the_tail_counts(tiny, tiny_domain):
    model, tokenizer = tiny
    texts = tiny_domain.test[:4]
    ids = tokenizer("\n\n".join(texts))["input_ids"]
    losses = []
    for start in range(0, len(ids), 64):
        window = torch.tensor([ids[start : start + 64]])
        if window.shape[1] > 1:
            with torch.no_grad():
                logits = model(input_ids=window).logits[0, :-1]
            losses += torch.nn.functional.cross_entropy(
                logits, window[0, 1:], reduction="none"
            ).tolist()
    found = lab.perplexity(model, tokenizer, texts, seq_len=64, batch_size=3)
    assert found.tokens == len(losses)
    assert found.value == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)


def test_overlap_gives_every_token_more_context(tiny, tiny_domain):
    model, tokenizer = tiny
    texts = tiny_domain.test[:6]
    plain = lab.perplexity(model, tokenizer, texts, seq_len=64)
    overlapping = lab.perplexity(model, tokenizer, texts, seq_len=64, stride=16)
    total = len(tokenizer("\n\n".join(texts))["input_ids"])
    assert overlapping.tokens == total - 1 > plain.tokens
    assert overlapping.value < plain.value


def test_batch_size_does_not_matter_and_limits_do(tiny, tiny_domain):
    model, tokenizer = tiny
    one, many = (
        lab.perplexity(model, tokenizer, tiny_domain.test, seq_len=64, max_tokens=700, batch_size=n)
        for n in (1, 5)
    )
    assert one.value == pytest.approx(many.value, rel=1e-5)
    assert 500 < one.tokens <= 700


def test_the_interval_holds_the_value_and_is_seeded(tiny, tiny_domain):
    model, tokenizer = tiny
    a, b = (lab.perplexity(model, tokenizer, tiny_domain.test, seq_len=64) for _ in range(2))
    assert a.low < a.value < a.high and (a.low, a.high) == (b.low, b.high)
    assert a.bits_low < a.bits_per_character < a.bits_high
    alone = lab.perplexity(model, tokenizer, tiny_domain.test[0], seq_len=64)
    assert math.isnan(alone.low) and math.isnan(alone.high)
    assert "windows of 64" in a.protocol and "tiny-law/test" in str(a)
    assert float(a) == a.value == a.row()["perplexity"]
    assert a.passages[:, 1].sum() == a.tokens


def test_the_model_is_left_as_it_was(tiny, tiny_domain):
    model, tokenizer = tiny
    model.train()
    try:
        first = lab.perplexity(model, tokenizer, tiny_domain.test[0])
        assert model.training
    finally:
        model.eval()
    assert first.value == lab.perplexity(model, tokenizer, tiny_domain.test[0]).value


def test_bad_input_is_named(tiny, tiny_domain):
    model, tokenizer = tiny
    for arguments, words in (
        ({"text": []}, "is empty"),
        ({"text": ["", "\n"]}, "is empty"),
        ({"seq_len": 1}, "seq_len is 1; expected a whole number of at least 2"),
        ({"stride": 300}, "stride=300"),
        ({"stride": 128, "chunked": True}, "leave stride out"),
        ({"seq_len": 512}, "windows of 512 tokens are longer"),
        ({"stride": 0}, "stride is 0"),
        ({"max_tokens": 1}, "max_tokens is 1"),
        ({"max_characters": -1}, "max_characters is -1"),
        ({"batch_size": -1}, "batch_size is -1; expected a whole number of at least 1"),
        ({"batch_size": 2.5}, "batch_size is 2.5"),
        ({"n_bootstrap": 0}, "n_bootstrap is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"progress": "yes"}, "progress is 'yes'"),
        ({"text": 3}, "text is 3"),
        ({"text": ["a", None]}, "expected texts"),
        ({"tokenizer": model}, "tokenizer is a LlamaForCausalLM; expected a PreTrainedTokenizer"),
        ({"model": tokenizer}, "model is a .*; expected a PreTrainedModel"),
    ):
        with pytest.raises(ValueError, match=words):
            given = {"model": model, "tokenizer": tokenizer, "text": tiny_domain.test}
            lab.perplexity(**{**given, **arguments})
    for prompt in ("", None, ["a"]):
        with pytest.raises(InvalidArgument, match="prompt is "):
            lab.generate(model, tokenizer, prompt)
    for count in (0, -1, None, 1.5):
        with pytest.raises(InvalidArgument, match="max_new_tokens is "):
            lab.generate(model, tokenizer, "The court", max_new_tokens=count)
    with pytest.raises(InvalidArgument, match="this model takes 256"):
        lab.generate(model, tokenizer, "The court", max_new_tokens=300)


def test_nan_is_an_error_and_not_a_number_less(tiny, tiny_domain, monkeypatch):
    model, tokenizer = tiny
    real = language.token_losses

    def half_nan(*arguments):
        losses = real(*arguments)
        losses[:, 20:] = float("nan")
        return losses

    monkeypatch.setattr(language, "token_losses", half_nan)
    with pytest.raises(ValueError, match="gives NaN on tiny-law/test"):
        lab.perplexity(model, tokenizer, tiny_domain.test, seq_len=64)


def test_an_excerpt_is_the_same_text_for_every_vocabulary(tiny, tiny_domain):
    model, tokenizer = tiny
    batches = lab.tokenize(tiny_domain.calibration, tokenizer, seq_len=64, max_tokens=512)
    found = lab.collect_statistics(model, batches, progress=False)
    mini = lab.shrink(model, lab.contextual_plan(model, found, epsilon_embedding=0.0))
    text = lab.excerpt(tiny_domain.test, tokenizer, max_tokens=600)
    assert str(text) == "tiny-law/test" and 1 < len(text) < len(tiny_domain.test)
    pair = [lab.perplexity(m, tokenizer, text, seq_len=64) for m in (model, mini)]
    length = len("\n\n".join(text))
    assert all(0.95 * length < found.characters < length for found in pair)  # scored
    assert pair[0].tokens < pair[1].tokens
    assert len(lab.excerpt(tiny_domain.test, tokenizer, max_tokens=2)) == 1  # never nothing


def test_generation_continues_the_prompt(tiny):
    model, tokenizer = tiny
    text = lab.generate(model, tokenizer, "The court", max_new_tokens=8)
    assert text and text == lab.generate(model, tokenizer, "The court", max_new_tokens=8)


def test_infinite_losses_of_a_low_precision_are_read_again(tiny, tiny_domain):
    """float16 ends at 65,504; a loss that is infinite in float32 too is what the model says."""
    expected = lab.perplexity(*tiny, tiny_domain.test[:2], seq_len=64, progress=False)
    model, ruled_out = copy.deepcopy(tiny[0]), torch.arange(0, 1000, 50)
    spoilt = (torch.float16,)

    def overflow(_module, _inputs, output):
        out = output.index_fill(-1, ruled_out, -torch.inf)
        return out if output.dtype in spoilt else output

    model.get_output_embeddings().register_forward_hook(overflow)
    model, how = model.half(), {"seq_len": 64, "progress": False}
    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.warns(UserWarning, match="gives infinite values on text in float16; all is read"),
    ):
        patch.delenv("MINIGPT_LAB_PRECISION")
        found = lab.perplexity(model, tiny[1], tiny_domain.test[:2], **how)
    assert found.precision == "float32" and found.value == pytest.approx(expected.value, rel=0.01)
    spoilt = (torch.float32,)
    assert lab.perplexity(model, tiny[1], tiny_domain.test[:2], **how).value == torch.inf
