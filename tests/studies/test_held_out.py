"""Held-out measurements: the dense decoder reads each text once, whatever is compared with it."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import CONFIGS, logits, random_model
from tokenizers.processors import TemplateProcessing

import minigpt_lab as lab
from minigpt_lab.domains import window_prefix
from minigpt_lab.studies.held_out import HeldOut, decoder_runs_once


@pytest.mark.parametrize("family", CONFIGS)
def test_a_second_pass_gives_the_same_logits_without_the_decoder(family):
    model = random_model(family)
    ids = torch.randint(3, 97, (2, 24), generator=torch.Generator().manual_seed(0))
    expected, states = logits(model, ids), {}
    for _ in range(2):
        with decoder_runs_once(model, states):
            assert torch.equal(logits(model, ids), expected)
    with decoder_runs_once(model, states):
        assert torch.equal(logits(model, ids[:1]), logits(model, ids[:1]))  # another window
    assert len(states) in (0, 2)  # 0: the family's head reads its decoder another way
    assert "forward" not in vars(model.base_model)
    assert torch.equal(logits(model, ids), expected)


def test_measured_as_without_the_states(tiny, tiny_domain):
    model, tokenizer = tiny
    held_out = HeldOut(model, tokenizer, [tiny_domain.test], max_tokens=500, seq_len=64, path=None)
    noisy = copy.deepcopy(model)
    with torch.no_grad():
        noisy.model.layers[0].mlp.down_proj.weight.mul_(0.9)
    calls = []
    with model.model.layers[0].register_forward_pre_hook(lambda *_: calls.append(1)):
        first, second = (held_out.measure(noisy) for _ in range(2))
    assert first == second
    assert len(calls) == len(held_out._states)  # each step of windows, once
    text = lab.excerpt(tiny_domain.test, tokenizer, max_tokens=500)
    expected = lab.divergence(
        noisy, model, tokenizer, text, seq_len=64, max_characters=None, progress=False
    )
    assert first["rows"][0]["kl"] == pytest.approx(expected.kl)


def test_results_are_kept_by_what_they_depend_on(tiny, tiny_domain, tmp_path):
    """Another precision, or a tokenizer that begins a text otherwise, is another measurement."""
    model, tokenizer = tiny
    begins = copy.deepcopy(tokenizer)
    single = TemplateProcessing("<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id or 0)])
    begins.backend_tokenizer.post_processor = single
    assert window_prefix(begins) != window_prefix(tokenizer)
    how = {"max_tokens": 256, "seq_len": 64, "path": tmp_path / "cells.json"}
    facts = [
        HeldOut(model, words, [tiny_domain.test], **how, precision=precision).facts
        for words in (tokenizer, begins)
        for precision in ("float32", "bfloat16")
    ]
    assert all(facts.count(each) == 1 for each in facts)
