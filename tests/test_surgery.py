"""The rule the kit stands on: mask ≡ shrink, for every family and random plans."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from conftest import CONFIGS, random_model
from hypothesis import given, settings
from hypothesis import strategies as st

import minigpt_lab as lab
from minigpt_lab.families import ALL_SITES, Anatomy, weight_axis
from minigpt_lab.sizes import dense_parameters

ids = st.integers(0, 2**32 - 1)


def random_plan(model, seed: int, vocabulary: bool = True) -> lab.PruningPlan:
    """Units, features and tokens cut at random: every kind of cut, every family."""
    rng = np.random.default_rng(seed)
    anatomy = Anatomy(model)

    def subset(total: int, least: int) -> list[int]:
        size = rng.integers(least, total + 1)
        return np.sort(rng.choice(total, size, replace=False)).tolist()

    units = {site: anatomy.units(site) for site in ALL_SITES}
    keep = {site: [subset(n, 1) for n in counts] for site, counts in units.items()}
    zero = {}
    for _, name, module in anatomy.linears():
        zero[name] = {
            side: subset(module.weight.shape[weight_axis(module, side)], 0)[:3]
            for side in ("input", "output")
        }
        if module.bias is not None:
            zero[name]["bias"] = zero[name]["output"][:1]
    rows = model.get_input_embeddings().weight.shape[0]
    kept = sorted({*range(3), *subset(rows, 20)}) if vocabulary else None
    # features of removed units are not listed in a plan
    stay = lab.PruningPlan("random", units, keep).staying_features(anatomy)
    for name, sides in zero.items():
        for side, indices in sides.items():
            mask = stay.get((name, "output" if side == "bias" else side))
            sides[side] = [i for i in indices if mask is None or mask[i]]
    return lab.PruningPlan("random", units, keep, zero, rows, kept)


def logits(model, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("family", sorted(CONFIGS))
@settings(max_examples=12, deadline=None)
@given(seed=ids)
def test_masked_and_shrunk_agree(family, seed):
    model = random_model(family)
    plan = random_plan(model, seed)
    kept = torch.tensor(plan.vocabulary)
    places = torch.randint(len(kept), (2, 12), generator=torch.Generator().manual_seed(1))
    with lab.masked(model, plan):
        expected = logits(model, kept[places])
    found = logits(lab.shrink(model, plan), places)
    torch.testing.assert_close(found, expected[..., kept], atol=1e-4, rtol=1e-4)
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
    assert dense_parameters(twice) == dense_parameters(model) == lab.model_size(model).stored
    left = lab.model_size(twice, model).frame()["stored_ratio"][0]
    assert lab.label(twice) == f"{lab.label(model)}, cut to {left:.1%} of its parameters"
    assert len(repr(first)) < 500


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


def test_a_plan_for_another_shape_is_refused(model):
    plan = random_plan(model, 9)
    mini = lab.shrink(model, plan)
    other = lab.PruningPlan("", {"ffn": [21] * 3}, {"ffn": [[0]] * 3})
    with pytest.raises(ValueError, match="ffn units per layer"), lab.masked(mini, other):
        pass
