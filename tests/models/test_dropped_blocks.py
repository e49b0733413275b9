"""Layers without attention, without an FFN, or without both: every family computes with them."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import logits, random_model, random_plan
from transformers import AutoModelForCausalLM

import minigpt_lab as lab
from minigpt_lab.models import ALL_SITES, Anatomy, fingerprint, keep_all

GREEDY = {"max_new_tokens": 6, "do_sample": False}


def dropping(model, attention=(), ffn=(), site="attention") -> lab.PruningPlan:
    """A plan that drops blocks of some layers, and one unit of what other layers keep."""
    anatomy = Anatomy(model)
    keep = keep_all(anatomy, ALL_SITES)
    for name, layers in ((site, attention), ("ffn", ffn)):
        keep[name] = [
            [] if layer in layers else units[len(units) > 1 :]
            for layer, units in enumerate(keep[name])
        ]
    return lab.PruningPlan("", anatomy.layer_widths(), keep)


@pytest.mark.parametrize(
    ("attention", "ffn", "site"),
    [([0], [1], "attention"), ([1, 2], [1], "balanced_heads"), ([0, 1, 2], [0, 2], "attention")],
)
def test_masked_shrunk_reloaded_and_predicted_agree(tmp_path, model, probe, attention, ffn, site):
    plan = dropping(model, attention, ffn, site)
    mini = lab.shrink(model, plan)
    assert lab.model_size(mini) == plan.predicted_size(model)
    for layer, (heads, channels) in enumerate(
        zip(Anatomy(mini).units("attention"), Anatomy(mini).units("ffn"), strict=True)
    ):
        assert (heads == 0) == (layer in attention) and (channels == 0) == (layer in ffn)
    with lab.masked(model, plan):
        expected, written = logits(model, probe), model.generate(probe, **GREEDY)
    torch.testing.assert_close(logits(mini, probe), expected, atol=1e-4, rtol=1e-4)
    assert (logits(model, probe) - expected).abs().max() > 0.1
    # with a cache, whose length transformers reads from the first layer, and without
    for use_cache in (True, False):
        assert torch.equal(mini.generate(probe, use_cache=use_cache, **GREEDY), written)
    mini.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is type(mini) and fingerprint(again) == fingerprint(mini)
    for each in (again, copy.deepcopy(mini)):
        assert torch.equal(logits(each, probe), logits(mini, probe))


def test_a_dropped_block_adds_only_its_bias(probe):
    """OPT's projections have biases, and no norm stands behind them."""
    model = random_model("opt")
    mini = lab.shrink(model, dropping(model, attention=[1], ffn=[1]))
    layer = mini.model.decoder.layers[1]
    states = mini.model.decoder(input_ids=probe, output_hidden_states=True).hidden_states
    added = layer.self_attn.out_proj.bias + layer.fc2.bias
    torch.testing.assert_close(states[2] - states[1], added.expand_as(states[1]))


@pytest.mark.parametrize("family", ["llama", "gemma3", "bloom"], indirect=True)
def test_other_caches_know_their_length(model, padded):
    mini = lab.shrink(model, dropping(model, attention=[0, 1], ffn=[2]))
    alone = mini.generate(**padded, use_cache=False, num_beams=2, **GREEDY)
    assert torch.equal(mini.generate(**padded, num_beams=2, **GREEDY), alone)
    alone = mini.generate(**padded, use_cache=False, **GREEDY)
    assert torch.equal(mini.generate(**padded, cache_implementation="static", **GREEDY), alone)


def test_blocks_are_dropped_of_a_pruned_model_and_filled_again(tmp_path, model, words, probe):
    first = lab.shrink(model, random_plan(model, 3, vocabulary=False))
    twice = lab.shrink(first, dropping(first, attention=[0], ffn=[2]))
    plan = random_plan(twice, 4, vocabulary=False)  # nothing is left to keep of these blocks
    with lab.masked(twice, plan):
        expected = logits(twice, probe)
    mini = lab.shrink(twice, plan)
    torch.testing.assert_close(logits(mini, probe), expected, atol=1e-4, rtol=1e-4)
    # units of zeros where plain transformers wants some
    portable = lab.save_model(mini, words, tmp_path / "portable", portable=True)
    plain = AutoModelForCausalLM.from_pretrained(portable)
    assert not type(plain).__name__.startswith("Minigpt")
    torch.testing.assert_close(logits(plain, probe), logits(mini, probe), atol=1e-4, rtol=1e-4)


def test_a_plan_keeps_at_least_one_block(model):
    with pytest.raises(ValueError, match="drops the attention and the FFN of every layer"):
        dropping(model, range(3), range(3)).require(model)
    mini = lab.shrink(model, dropping(model, range(3)))
    anatomy = Anatomy(mini)
    plan = lab.PruningPlan("", {"ffn": anatomy.units("ffn")}, {"ffn": [[], [], []]})
    for use in (lab.shrink, lambda mini, plan: plan.predicted_size(mini)):
        with pytest.raises(ValueError, match="at least one block"):
            use(mini, plan)
    with pytest.raises(ValueError, match="keeps no token"):
        lab.PruningPlan("", {}, {}, vocabulary_size=97, vocabulary=[])


def test_it_trains_in_every_weight_that_is_left(model, probe):
    mini = lab.shrink(model, dropping(model, attention=[1], ffn=[0])).train()
    mini(input_ids=probe, labels=probe).loss.backward()
    anatomy = Anatomy(mini)
    for _, name, module in anatomy.linears():
        assert not module.weight.numel() or module.weight.grad.abs().sum() > 0, name
