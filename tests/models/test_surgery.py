"""The rule the kit stands on: mask ≡ shrink, for every family and random plans."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from helpers import CONFIGS, logits, random_model, random_plan
from hypothesis import given, settings
from hypothesis import strategies as st

import minigpt_lab as lab
from minigpt_lab.models import Anatomy

ids = st.integers(0, 2**32 - 1)


@pytest.mark.parametrize("family", sorted(CONFIGS))
@settings(max_examples=12, deadline=None)
@given(seed=ids)
def test_masked_and_shrunk_agree(family, seed):
    model = random_model(family).double()  # some random weights blow up what float32 rounds
    plan = random_plan(model, seed)
    kept = torch.tensor(plan.vocabulary)
    places = torch.randint(len(kept), (2, 12), generator=torch.Generator().manual_seed(1))
    with lab.masked(model, plan):
        expected = logits(model, kept[places])
    found = logits(lab.shrink(model, plan), places)
    torch.testing.assert_close(found, expected[..., kept], atol=1e-6, rtol=1e-6)
    gone = np.setdiff1d(np.arange(97), plan.vocabulary)
    assert torch.isneginf(expected[..., gone]).all()


@pytest.mark.parametrize("family", sorted(CONFIGS))
@settings(max_examples=12, deadline=None)
@given(seed=ids)
def test_predicted_size_is_what_shrink_makes(family, seed):
    model = random_model(family)
    plan = random_plan(model, seed)
    assert plan.predicted_size(model) == lab.model_size(lab.shrink(model, plan), model)


def test_mask_restores_every_bit_also_on_an_exception(model, probe):
    before = copy.deepcopy(model.state_dict())
    dense = logits(model, probe)
    with pytest.raises(KeyError), lab.masked(model, random_plan(model, 3)):
        assert not torch.equal(logits(model, probe), dense)
        raise KeyError
    after = model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert torch.equal(logits(model, probe), dense)


def test_shrink_leaves_the_original_alone(model, probe):
    dense = logits(model, probe)
    mini = lab.shrink(model, random_plan(model, 4))
    assert torch.equal(logits(model, probe), dense)
    assert lab.model_size(mini).stored < lab.model_size(model).stored


def test_a_shrunk_model_can_be_masked_and_shrunk_again(model):
    first = random_plan(model, 5)
    once = lab.shrink(model, first)
    second = random_plan(once, 6)
    kept = torch.tensor(second.vocabulary)
    places = torch.arange(10)[None] % len(kept)
    with lab.masked(once, second):
        expected = logits(once, kept[places])[..., kept]
    twice = lab.shrink(once, second)
    torch.testing.assert_close(logits(twice, places), expected, atol=1e-4, rtol=1e-4)
    assert twice.pruning_plans == [first, second]
    stored = lab.model_size(twice, model).stored
    assert lab.label(twice) == f"{lab.label(model)}, pruned to {stored:,} parameters"
    assert len(repr(first)) < 500


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_models_of_one_layer_are_cut_like_others(family):
    model = random_model(family, layers=1)
    plan = random_plan(model, 41)
    kept = torch.tensor(plan.vocabulary)
    places = torch.arange(16).reshape(2, 8) % len(kept)
    with lab.masked(model, plan):
        expected = logits(model, kept[places])[..., kept]
    mini = lab.shrink(model, plan)
    torch.testing.assert_close(logits(mini, places), expected, atol=1e-4, rtol=1e-4)


def test_surviving_heads_keep_their_slopes(probe):
    """Against the dense model with silent heads: BLOOM's would renumber the rest."""
    model = random_model("bloom")
    keep = {"attention": [[1, 3], [0], [2, 1, 3]]}
    keep["attention"][2].sort()
    plan = lab.PruningPlan("", {"attention": [4, 4, 4]}, keep)
    mini = lab.shrink(model, plan)
    heads = [layer.surviving_heads.tolist() for layer in mini.transformer.h]
    assert heads == keep["attention"] and not hasattr(model.transformer.h[0], "surviving_heads")
    again = lab.shrink(
        mini, lab.PruningPlan("", {"attention": [2, 1, 3]}, {"attention": [[1], [0], [0, 2]]})
    )
    assert [layer.surviving_heads.tolist() for layer in again.transformer.h] == [[3], [0], [1, 3]]
    mask = torch.ones_like(probe)
    mask[0, :3] = 0  # padding moves the slopes' origin
    with torch.no_grad(), lab.masked(model, plan):
        expected = model(input_ids=probe, attention_mask=mask).logits
    with torch.no_grad():
        found = mini(input_ids=probe, attention_mask=mask).logits
        for layer in mini.transformer.h:
            layer.surviving_heads = torch.arange(len(layer.surviving_heads))
        renumbered = mini(input_ids=probe, attention_mask=mask).logits
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], atol=1e-4, rtol=1e-4)
    assert (renumbered - expected)[mask.bool()].abs().max() > 0.01


def test_layers_of_their_own_follow_the_models_config(probe):
    """Phi-3 splits by the config's number of heads, which only a view can make a layer's own."""
    model = random_model("phi3")
    mini = lab.shrink(
        model, lab.PruningPlan("", {"attention": [2] * 3}, {"attention": [[0], [0, 1], [1]]})
    )
    heads = [layer.self_attn.config.num_attention_heads for layer in mini.model.layers]
    assert heads == [2, 4, 2] and mini.config.num_attention_heads == 4
    expected = logits(mini, probe)
    copied = pickle.loads(pickle.dumps(copy.deepcopy(mini)))
    copied.set_attn_implementation("eager")
    assert copied.model.layers[0].self_attn.config._attn_implementation == "eager"
    torch.testing.assert_close(logits(copied, probe), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_a_mask_over_tokens_reaches_behind_a_soft_cap(family, probe):
    model = random_model(family)
    model.config.final_logit_softcapping = 2.0
    kept = list(range(60))
    plan = lab.PruningPlan("", {}, {}, vocabulary_size=97, vocabulary=kept)
    dense = logits(model, probe)
    with lab.masked(model, plan), lab.masked(model, plan):
        found = logits(model, probe % 60)
        loss = model(input_ids=probe % 60, labels=probe % 60).loss
    assert torch.isneginf(found[..., 60:]).all() and found[..., :60].abs().max() <= 2
    assert torch.equal(logits(model, probe), dense)
    mini = lab.shrink(model, plan)
    torch.testing.assert_close(logits(mini, probe % 60), found[..., :60], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mini(input_ids=probe % 60, labels=probe % 60).loss, loss)


@pytest.mark.parametrize("family", ["mistral", "phi3", "gemma2", "gemma3"])
def test_windows_that_slide_do_so_after_shrinking(family, probe, monkeypatch):
    windowed = copy.deepcopy(CONFIGS[family])
    windowed.sliding_window = 4
    wide = random_model(family)
    monkeypatch.setitem(CONFIGS, family, windowed)
    model = random_model(family)
    assert (logits(model, probe) - logits(wide, probe)).abs().max() > 1e-3
    plan = random_plan(model, 21, vocabulary=False)
    mini = lab.shrink(model, plan)
    with lab.masked(model, plan):
        torch.testing.assert_close(logits(mini, probe), logits(model, probe), atol=1e-4, rtol=1e-4)
    cached, plain = (
        mini.generate(probe, max_new_tokens=5, do_sample=False, use_cache=cache)
        for cache in (True, False)
    )
    assert torch.equal(cached, plain)


def test_a_number_of_heads_that_the_config_refuses_stays_out_of_it(probe):
    model = random_model("gemma3")  # 3 heads do not divide a hidden size of 32
    keep = {"balanced_heads": [[0, 1, 3]] * 3}
    mini = lab.shrink(model, lab.PruningPlan("", {"balanced_heads": [4] * 3}, keep))
    assert mini.config.num_attention_heads == 4
    assert Anatomy(mini).units("balanced_heads") == [3, 3, 3]
    assert logits(mini, probe).isfinite().all()


def test_masks_nest(model, probe):
    outer, inner = (random_plan(model, seed, vocabulary=False) for seed in (31, 32))
    dense = logits(model, probe)
    with lab.masked(model, outer):
        alone = logits(model, probe)
        with lab.masked(model, inner):
            assert not torch.equal(logits(model, probe), alone)
        assert torch.equal(logits(model, probe), alone)
    assert torch.equal(logits(model, probe), dense)


def test_generation_with_the_cache_after_shrinking(model, probe):
    mini = lab.shrink(model, random_plan(model, 7, vocabulary=False))
    with torch.no_grad():
        cached = mini.generate(probe, max_new_tokens=5, do_sample=False, use_cache=True)
        plain = mini.generate(probe, max_new_tokens=5, do_sample=False, use_cache=False)
    assert torch.equal(cached, plain)


def test_a_training_step_works_after_shrinking(model, probe):
    mini = lab.shrink(model, random_plan(model, 8, vocabulary=False)).train()
    loss = mini(input_ids=probe, labels=probe).loss
    loss.backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in mini.parameters())
    gradients = [p.grad.clone() for p in mini.parameters()]
    mini.zero_grad()
    mini.activation_checkpointing_enable()
    mini(input_ids=probe, labels=probe, use_cache=False).loss.backward()
    for parameter, expected in zip(mini.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, expected)


def test_arguments_in_the_wrong_order_are_named():
    model = random_model("llama")
    plan = random_plan(model, 9)
    with pytest.raises(
        TypeError, match=r"a LlamaForCausalLM; expected a PruningPlan; pass it after"
    ):
        lab.shrink(plan, model)
    with pytest.raises(TypeError, match="plan is {}; expected a"), lab.masked(model, {}):
        pass


def test_a_plan_for_another_shape_is_refused(model):
    plan = random_plan(model, 9)
    mini = lab.shrink(model, plan)
    other = lab.PruningPlan("", {"ffn": [21] * 3}, {"ffn": [[0]] * 3})
    with pytest.raises(ValueError, match="ffn units per layer"), lab.masked(mini, other):
        pass
