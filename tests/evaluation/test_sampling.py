"""Texts that a model writes of its own accord."""

from __future__ import annotations

import copy

import pytest
import torch

import minigpt_lab as lab
from minigpt_lab.domains import token_ids

LENGTHS = {"max_tokens": 600, "seq_len": 32, "batch_size": 4, "progress": False}


def test_the_texts_are_drawn_from_the_models_own_predictions(tiny):
    """So its loss on them is its entropy: far below that on words in random order."""
    model, tokenizer = tiny
    texts = lab.sample_texts(model, tokenizer, **LENGTHS)
    ids = [token_ids(text, tokenizer) for text in texts]
    assert 500 <= sum(map(len, ids)) <= 700  # written anew, a text may have a few tokens more
    assert max(map(len, ids)) <= 40 and len({*texts}) == len(texts)
    shuffled = [torch.tensor(row)[torch.randperm(len(row))].tolist() for row in ids]
    options = {"seq_len": 32, "max_characters": None, "progress": False}
    own = lab.perplexity(model, tokenizer, texts, **options).value
    other = lab.perplexity(model, tokenizer, tokenizer.batch_decode(shuffled), **options).value
    assert own < other / 2


def test_a_seed_decides_and_nothing_is_left_changed(tiny):
    model, tokenizer = tiny
    settings = model.generation_config
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    texts = [lab.sample_texts(model, tokenizer, seed=seed, **LENGTHS) for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
    assert model.generation_config is settings
    assert torch.equal(torch.random.get_rng_state(), before)


def test_texts_end_at_the_end_of_text_token(tiny):
    model, tokenizer = copy.deepcopy(tiny[0]), tiny[1]
    common = token_ids("the", tokenizer)[0]
    model.generation_config.eos_token_id = [common, *token_ids(" a", tokenizer)[:1]]
    model.generation_config.pad_token_id = common
    for text in lab.sample_texts(model, tokenizer, **LENGTHS):
        assert not {*token_ids(text, tokenizer)[1:]} & {*model.generation_config.eos_token_id}


def test_general_text_of_its_own_keeps_more_of_a_model(tiny, tiny_domain):
    model, tokenizer = tiny
    own = lab.sample_texts(model, tokenizer, **LENGTHS | {"max_tokens": 2_000})
    general = lab.tokenize(own, tokenizer, seq_len=32)
    batches = lab.tokenize(tiny_domain.calibration, tokenizer, seq_len=32, max_tokens=1_000)
    other = lab.load_domain("tiny-games").test
    options = {"ratio": 0.6, "sites": ("ffn",), "progress": False}
    kl = []
    for share in (0.0, 0.5):
        mini, _ = lab.slimgpt(model, batches, general=general, generality=share, **options)
        kl.append(lab.divergence(mini, model, tokenizer, other, seq_len=32, progress=False).kl)
    assert kl[1] < kl[0]


def test_bad_input(tiny):
    model, tokenizer = copy.deepcopy(tiny[0]), tiny[1]
    longest = model.config.max_position_embeddings
    with pytest.raises(ValueError, match=f"this model takes {longest} tokens"):
        lab.sample_texts(model, tokenizer, seq_len=longest + 1)
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN on the texts that it writes: check its"):
        lab.sample_texts(model, tokenizer, **LENGTHS)


def test_nan_of_low_precision_is_written_again_in_float32(tiny):
    model, tokenizer = copy.deepcopy(tiny[0]), tiny[1]
    expected = lab.sample_texts(model, tokenizer, **LENGTHS)

    def overflow(_module, _inputs, output):
        return output * float("nan") if output.dtype == torch.bfloat16 else output

    model.model.layers[0].mlp.down_proj.register_forward_hook(overflow)
    with pytest.warns(UserWarning, match="texts that it writes in bfloat16; all is read again"):
        found = lab.sample_texts(model, tokenizer, precision="bfloat16", **LENGTHS)
    assert found == expected and not model._forward_hooks
