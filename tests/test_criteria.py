"""Criteria: numbers against naive computations, and the registry."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import random_model

import minigpt_lab as lab
from minigpt_lab.families import ALL_SITES, Anatomy


def test_magnitude_is_the_sum_over_a_units_weights():
    model = random_model("llama")
    values = lab.score("magnitude", model, norm="l1").values
    mlp, attention = model.model.layers[1].mlp, model.model.layers[1].self_attn
    weights = [mlp.gate_proj.weight[5], mlp.up_proj.weight[5], mlp.down_proj.weight[:, 5]]
    assert values["ffn"][1][5] == pytest.approx(sum(w.abs().sum().item() for w in weights))
    rows, group = slice(16, 32), slice(8, 16)  # two query heads of 8 to one key/value head
    weights = [
        attention.q_proj.weight[rows], attention.k_proj.weight[group],
        attention.v_proj.weight[group], attention.o_proj.weight[:, rows],
    ]  # fmt: skip
    assert values["attention"][1][1] == pytest.approx(sum(w.abs().sum().item() for w in weights))


def test_query_heads_are_scored_over_all_groups_and_leave_them_alike(probe):
    model = random_model("llama")
    values = lab.score("magnitude", model, norm="l1", units="balanced_heads").values
    attention = model.model.layers[1].self_attn
    rows = [*range(8, 16), *range(24, 32)]  # the second of the two query heads of both groups
    weights = [attention.q_proj.weight[rows], attention.o_proj.weight[:, rows]]
    assert [*values] == ["ffn", "balanced_heads"]
    expected = sum(w.abs().sum().item() for w in weights)
    assert values["balanced_heads"][1][1] == pytest.approx(expected)
    scores = lab.score("contextual", model, [{"input_ids": probe}], units="balanced_heads")
    plan = lab.plan_from_scores(model, scores, ratio=0.5)
    assert plan.units["balanced_heads"] == [2, 2, 2] and plan.removed["balanced_heads"] == [1, 1, 1]
    mini = lab.shrink(model, plan)
    assert Anatomy(mini).units("attention") == [2, 2, 2]
    assert (mini.config.num_attention_heads, mini.config.num_key_value_heads) == (2, 2)
    assert mini(input_ids=probe).logits.isfinite().all()


def test_criteria_score_what_uneven_cuts_left(probe):
    model = random_model("phi3")
    keep = {"attention": [[0], [0, 1], [1]], "balanced_heads": [[0, 1], [1], [0]]}
    units = {"attention": [2, 2, 2], "balanced_heads": [2, 2, 2]}
    mini = lab.shrink(model, lab.PruningPlan("", units, keep))
    with pytest.raises(ValueError, match=r"differ in their balanced_heads \[1, 2\]"):
        Anatomy(mini).unit_positions(Anatomy(mini).family.consumes["attention"], 1)
    for name in ("magnitude", "contextual", "random"):
        values = lab.score(name, mini, [{"input_ids": probe}], sites=ALL_SITES).values
        assert [len(v) for v in values["attention"]] == [1, 2, 1]
        assert [len(v) for v in values["balanced_heads"]] == [2, 1, 1]


def test_random_is_seeded(model):
    a, b, c = (lab.score("random", model, seed=seed).frame()["score"] for seed in (1, 1, 2))
    assert a.equals(b) and not a.equals(c)


def test_contextual_scores_are_the_statistics(model, probe):
    batches = [{"input_ids": probe}]
    found = lab.collect_statistics(model, batches, progress=False)
    values = lab.score("contextual", model, batches, sites=("ffn", "attention")).values
    np.testing.assert_allclose(
        values["ffn"][2], found.mean(found.activations[2], "activation", "absolute")
    )
    assert [len(v) for v in values["attention"]] == Anatomy(model).units("attention")
    again = lab.score("contextual", model, statistics=found).values
    np.testing.assert_array_equal(again["ffn"][0], values["ffn"][0])


def test_a_users_criterion_joins_the_registry(model):
    @lab.criterion("first-units-first")
    def ascending(model, batches=None, statistics=None, *, sites):
        return {site: [np.arange(n) for n in Anatomy(model).units(site)] for site in sites}

    try:
        scores = lab.score("first-units-first", model, sites=("ffn",))
        plan = lab.plan_from_scores(model, scores, ratio=0.25)
        channels = Anatomy(model).units("ffn")[0]
        assert plan.keep["ffn"] == [list(range(channels // 4, channels))] * 3
    finally:
        del lab.CRITERIA["first-units-first"]


def test_unknown_names_get_the_nearest(model):
    with pytest.raises(ValueError, match="did you mean 'magnitude'"):
        lab.score("magnitud", model)
    with pytest.raises(ValueError, match="unknown site 'head'"):
        lab.score("random", model, sites=("head",))
    with pytest.raises(ValueError, match="unknown units 'heads'; did you mean 'balanced_heads'"):
        lab.score("random", model, units="heads")
    with pytest.raises(ValueError, match="one query head per key/value group.*units='kv_group'"):
        lab.score("random", random_model("opt"), units="balanced_heads")
    with pytest.raises(ValueError, match="needs batches"):
        lab.score("contextual", model)


def test_scores_that_are_no_numbers_are_refused(model):
    @lab.criterion("lost")
    def lost(model, batches=None, statistics=None, *, sites):
        return {site: [np.full(n, np.nan) for n in Anatomy(model).units(site)] for site in sites}

    try:
        with pytest.raises(ValueError, match="lost gives NaN"):
            lab.score("lost", model)
    finally:
        del lab.CRITERIA["lost"]
