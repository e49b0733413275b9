"""Thresholds, quantiles, ratios and budgets: what a plan cuts and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import CONFIGS, logits, random_model
from hypothesis import given, settings
from hypothesis import strategies as st

import minigpt_lab as lab
from minigpt_lab.models.anatomy import Anatomy

GROUPED = {
    name
    for name, config in CONFIGS.items()
    if config.num_attention_heads > getattr(config, "num_key_value_heads", 4)
}


@pytest.fixture
def statistics(model, probe):
    return lab.collect_statistics(model, [{"input_ids": probe}], progress=False)


def test_activation_threshold_removes_the_channels_at_or_below_it(model, statistics):
    name = statistics.activations[0]
    magnitude = statistics.mean(name, "activation", "absolute")
    epsilon = float(np.sort(magnitude)[4])  # at the threshold counts as below
    plan = lab.contextual_plan(model, statistics, epsilon_activation=epsilon)
    assert plan.keep["ffn"][0] == np.flatnonzero(magnitude > epsilon).tolist()
    assert plan.zero == {} and plan.vocabulary is None


def test_linear_threshold_follows_the_unbiased_rule(model, statistics):
    name = next(iter(statistics.layer_of))
    absolute = statistics.mean(name, "output", "absolute")
    unbiased = statistics.mean(name, "output", "unbiased")
    epsilon = float(np.median(np.minimum(absolute, unbiased)))
    plan = lab.contextual_plan(model, statistics, epsilon_linear=(None, epsilon))
    cut = set(np.flatnonzero(np.minimum(absolute, unbiased) <= epsilon))
    assert set(plan.zero[name]["output"]) <= cut
    staying = _staying_rows(model, plan, name)
    assert set(plan.zero[name]["output"]) == cut & staying
    if statistics.biased(name):
        assert set(plan.zero[name]["bias"]) == set(np.flatnonzero(absolute <= epsilon)) & staying
    else:
        assert "bias" not in plan.zero[name]


def _staying_rows(model, plan, name) -> set[int]:
    return {*np.flatnonzero(plan.kept_features(Anatomy(model))[name]["output"])}


def test_linear_cuts_that_kill_a_unit_remove_it(model, statistics):
    consumer = Anatomy(model).family.consumes["ffn"]
    name = Anatomy(model).name(2, consumer)
    magnitude = statistics.mean(name, "input", "absolute")
    epsilon = float(np.sort(magnitude)[6])
    plan = lab.contextual_plan(model, statistics, epsilon_linear=(epsilon, None))
    assert plan.keep["ffn"][2] == np.flatnonzero(magnitude > epsilon).tolist()
    assert name not in plan.zero  # what leaves is not listed as zeroed


@settings(max_examples=15, deadline=None)
@given(share=st.floats(0, 0.99))
def test_quantile_cuts_the_same_share_of_every_layer(share):
    model = random_model("qwen2")
    batch = {"input_ids": torch.arange(24).reshape(2, 12)}
    found = lab.collect_statistics(model, [batch], progress=False)
    plan = lab.contextual_plan(model, found, quantile=share)
    expected = min(int(share * 20 + 1e-9), 19)
    assert plan.removed["ffn"] == [expected] * 3


def test_huge_thresholds_leave_one_unit_and_the_model_runs(model, statistics, probe):
    plan = lab.contextual_plan(model, statistics, epsilon_linear=1e9, epsilon_activation=1e9)
    assert {n for layers in plan.keep.values() for n in map(len, layers)} == {1}
    mini = lab.shrink(model, plan)
    assert mini(input_ids=probe).logits.isfinite().all()


@pytest.mark.parametrize(
    "rules",
    [
        {"epsilon_linear": 0.5, "epsilon_activation": 0.1},
        {"epsilon_linear": (0.6, None)},
        {"quantile": {"linear": 0.9, "activation": 0.5}},
        {"epsilon_linear": (None, 1e9)},
        {"epsilon_linear": 1e9},
    ],
)
@pytest.mark.parametrize("family", sorted(GROUPED))
def test_plans_of_query_heads_compute_what_plans_of_groups_do(model, statistics, probe, rules):
    """Both kinds of units leave only where they have no effect, so they differ in size alone."""
    plan = lab.contextual_plan(model, statistics, **rules, units="balanced_heads")
    groups = lab.contextual_plan(model, statistics, **rules)
    assert groups == lab.contextual_plan(model, statistics, **rules, units="kv_group")
    assert not any(plan.removed["attention"]) and plan.keep["ffn"] == groups.keep["ffn"]
    assert all(layer for layers in plan.keep.values() for layer in layers)
    mini = lab.shrink(model, plan)
    assert Anatomy(mini).units("balanced_heads") == [*map(len, plan.keep["balanced_heads"])]
    assert plan.predicted_size(model) == lab.model_size(mini, model)
    found = []
    for cut in (plan, groups):
        with lab.masked(model, cut):
            found.append(logits(model, probe))
    torch.testing.assert_close(logits(mini, probe), found[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)


def test_a_query_head_leaves_once_no_group_hears_it():
    model, layer = random_model("llama"), 1
    batch = {"input_ids": torch.arange(3, 27).reshape(2, 12)}
    found = lab.collect_statistics(model, [batch], progress=False)
    name = f"model.layers.{layer}.self_attn"
    read = found.mean(f"{name}.o_proj", "input", "absolute").reshape(2, 2, 8)  # group, head
    loudest, value = read.max(2), found.magnitude(f"{name}.v_proj", "output").reshape(2, 8).max(1)
    silent, other = value.argsort()
    epsilons = float(loudest[other].min()), float(value[silent])
    head = int(loudest[other].argmin())
    for rule, staying in {
        epsilons: [1 - head],  # cut in one group, of no value in the other
        (epsilons[0], None): [0, 1],
        (float(loudest.max(0).min()), None): [int(loudest.max(0).argmax())],
        (None, 1e9): [int(read.mean((0, 2)).argmax())],  # the strongest always stays
    }.items():
        plan = lab.contextual_plan(model, found, epsilon_linear=rule, units="balanced_heads")
        assert plan.keep["balanced_heads"][layer] == staying, rule


def test_unknown_units_are_named(model, family, statistics):
    with pytest.raises(ValueError, match="units is 'heads'; .* did you mean 'balanced_heads'"):
        lab.contextual_plan(model, statistics, units="heads")
    if family not in GROUPED:
        with pytest.raises(ValueError, match="one query head per key/value group.*'kv_group'"):
            lab.contextual_plan(model, statistics, units="balanced_heads")


def test_zero_threshold_cuts_only_what_is_never_on(model, statistics):
    plan = lab.contextual_plan(model, statistics, epsilon_activation=0.0)
    dead = [statistics.mean(n, "activation", "absolute") == 0 for n in statistics.activations]
    assert plan.removed["ffn"] == [int(layer.sum()) for layer in dead]


def test_hashes_are_short_where_a_plan_is_shown():
    model = random_model("llama")
    found = lab.collect_statistics(model, [{"input_ids": torch.ones(1, 4).long()}], progress=False)
    plan = lab.contextual_plan(model, found, quantile=0.3)
    whole = plan.origin["content_hash"]
    assert len(whole) == 64 and whole not in str(plan)
    assert f"content_hash={whole[:12]})" in str(plan)


def test_a_plan_equals_its_json(tmp_path, model, statistics):
    plan = lab.contextual_plan(model, statistics, epsilon_linear=0.3, epsilon_activation=0.2)
    assert lab.PruningPlan.load(plan.save(tmp_path / "plan.json")) == plan
    text = str(plan)
    assert "ffn" in text and "units removed" in text and "epsilon_activation=0.2" in text
    data = plan.to_dict()
    for change in (
        {"keep": {"ffn": plan.keep["ffn"][:1]}},
        {"keep": {"mlp": [[0]] * 3}},
        {"keep": {"ffn": [[0], [1, 1], [2]]}},
        {"vocabulary": [3, 2]},
        {"vocabulary": [0, 97]},
    ):
        with pytest.raises(ValueError, match="plan"):
            lab.PruningPlan.from_dict({**data, **change})
    name = next(iter(statistics.layer_of))
    wrong = lab.PruningPlan.from_dict({**data, "zero": {name: {"input": [999]}}})
    with pytest.raises(ValueError, match="zeroes input 999 of"):
        lab.shrink(model, wrong)
    (tmp_path / "bad.json").write_text('{"keep": {}}')
    with pytest.raises(ValueError, match="no pruning plan"):
        lab.PruningPlan.load(tmp_path / "bad.json")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"epsilon_activation": -1}, "epsilon_activation is -1"),
        ({"epsilon_activation": float("nan")}, "epsilon_activation is nan"),
        ({"epsilon_linear": -0.1}, "epsilon_linear_input is -0.1"),
        ({"epsilon_embedding": float("nan")}, "epsilon_embedding is nan"),
        ({"epsilon_activation": "0.1"}, "epsilon_activation is '0.1'; expected a number"),
        ({"epsilon_linear": [0.1]}, r"epsilon_linear is \[0.1\]; expected one number, or two"),
        ({"epsilon_linear": [0.1, "a"]}, "epsilon_linear_output is 'a'; expected a number"),
        ({"epsilon_embedding": True}, "epsilon_embedding is True; expected a number"),
        ({"quantile": [0.1]}, r"quantile is \[0.1\]; expected a number"),
        ({"quantile": {"linear": "0.1"}}, r"quantile\['linear'\] is '0.1'; expected a number"),
        ({"quantile": 1.0}, r"of at least 0 and below 1"),
        ({"quantile": {"heads": 0.1}}, r"a key of quantile is 'heads'; expected"),
        ({"quantile": 0.1, "epsilon_activation": 0.1}, "activation has two rules"),
        ({"epsilon_embedding": 0.0}, "merges"),
    ],
)
def test_bad_thresholds_are_named(model, statistics, arguments, words):
    with pytest.raises(ValueError, match=words):
        lab.contextual_plan(model, statistics, **arguments)


def test_ratio_and_untouched_layers(model):
    scores = lab.score(model, "random", seed=3)
    plan = lab.plan_from_scores(model, scores, ratio=0.5, keep_layers=(1, 1))
    half = Anatomy(model).units("ffn")[1] // 2
    assert plan.removed["ffn"] == [0, half, 0]
    worst = np.argsort(scores.values["ffn"][1])[:half]
    assert not set(worst) & set(plan.keep["ffn"][1])


def test_budget_is_met_to_within_one_unit_per_layer(model):
    scores = lab.score(model, "magnitude", sites=("ffn",))
    dense = sum(p.numel() for p in model.parameters())
    unit = Anatomy(model).unit_parameters("ffn", 0)
    for target in (dense, dense - 7 * unit, dense - 31 * unit):
        stored = lab.plan_from_scores(model, scores, parameters=target).predicted_size(model).stored
        assert target - 3 * unit < stored <= target


def test_threshold_on_scores(model):
    scores = lab.score(model, "random", sites=("ffn",))
    plan = lab.plan_from_scores(model, scores, threshold=0.5)
    assert plan.removed["ffn"] == [int((v <= 0.5).sum()) for v in scores.values["ffn"]]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "exactly one"),
        ({"ratio": 0.1, "threshold": 0.1}, "exactly one"),
        ({"ratio": 1.0}, "ratio is 1.0"),
        ({"ratio": 0.1, "allocation": "psychic"}, "allocation is .psychic.; expected"),
        ({"ratio": 0.1, "keep_layers": (2, 1)}, "leaves nothing"),
        ({"parameters": 10}, "cannot be met"),
    ],
)
def test_bad_targets_are_named(model, arguments, words):
    with pytest.raises(ValueError, match=words):
        lab.plan_from_scores(model, lab.score(model, "random"), **arguments)


def test_scores_of_another_model_are_refused(model, family):
    with pytest.raises(ValueError, match="another model"):
        lab.plan_from_scores(model, lab.score(random_model(family, 1), "random"), ratio=0.1)


def test_a_global_cut_is_one_threshold_for_all_layers(model, statistics):
    scores = lab.score(model, "contextual", statistics=statistics, sites=("ffn",))
    plan = lab.plan_from_scores(model, scores, ratio=0.3, allocation="global")
    level = scores.highest_pruned(plan.keep)
    assert plan.keep == lab.plan_from_scores(model, scores, threshold=level).keep
    assert plan.keep == lab.contextual_plan(model, statistics, epsilon_activation=level).keep
    dead = int((scores.to_frame()["score"] == 0).sum())  # of a ReLU: all have the lowest score
    wanted = max(dead, 0.3 * sum(Anatomy(model).units("ffn")))
    assert sum(plan.removed["ffn"]) == pytest.approx(wanted, abs=1)
    dense = lab.plan_from_scores(model, scores, ratio=0.0, allocation="global")
    assert not any(dense.removed["ffn"]) and dense.origin["allocation"] == "global"
    for layer in scores.values["ffn"]:
        layer -= 100.0  # as standardised scores, all may be negative
    assert scores.highest_pruned(plan.keep) == pytest.approx(level - 100)
    assert scores.highest_pruned(dense.keep) == 0
