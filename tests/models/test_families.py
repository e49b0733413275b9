"""Declarative entries: layouts of units, what can be pruned, and what is not supported."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import random_model
from transformers import AutoModelForCausalLM, GPTJConfig

import minigpt_lab as lab
from minigpt_lab.models import ALL_SITES, Anatomy, Projection, keep_all, weight_axis


def test_units_and_costs_match_the_model(model):
    anatomy = Anatomy(model)
    dense = sum(p.numel() for p in model.parameters())
    for site in (site for site in ALL_SITES if anatomy.units(site)[1] > 1):
        keep = keep_all(anatomy, ALL_SITES)
        keep[site][1] = keep[site][1][1:]
        plan = lab.PruningPlan("", anatomy.layer_widths(), keep)
        mini = lab.shrink(model, plan)
        lost = dense - sum(p.numel() for p in mini.parameters())
        assert lost == anatomy.unit_parameters(site, 1)


def test_describe_names_units_and_shares(model):
    table = lab.describe(model).set_index("site")
    channels, queries = (Anatomy(model).units(site)[0] for site in ("ffn", "balanced_heads"))
    assert table.loc["attention", "unit"] == ("key/value group" if queries > 1 else "head")
    assert ("balanced_heads" in table.index) == (queries > 1)
    assert table.loc["ffn", "units_per_layer"] == str(channels)
    mini = lab.shrink(model, _fewer_tokens(model))
    cost = int(table.loc["vocabulary", "parameters_per_unit"])
    assert lab.model_size(model).stored - lab.model_size(mini).stored == 7 * cost
    assert 0 < table["share_of_model"].drop("balanced_heads", errors="ignore").sum() < 1
    mini = lab.shrink(model, _narrower(model))
    narrower = f"{channels - 1}–{channels}"
    assert lab.describe(mini).set_index("site").loc["ffn", "units_per_layer"] == narrower


def _fewer_tokens(model):
    return lab.PruningPlan("", {}, {}, vocabulary_size=97, vocabulary=list(range(90)))


def _narrower(model):
    anatomy = Anatomy(model)
    keep = {"ffn": keep_all(anatomy)["ffn"]}
    keep["ffn"][1].pop()
    return lab.PruningPlan("", {"ffn": anatomy.units("ffn")}, keep)


@pytest.mark.parametrize(
    ("interleaved", "expected"),
    [(False, [*range(16, 24), *range(48, 56), *range(80, 88)]), (True, [*range(48, 72)])],
)
def test_fused_projections_find_the_rows_of_a_head(interleaved, expected):
    anatomy = Anatomy(random_model("opt"))  # 4 heads of 8
    fused = Projection("qkv", ("query", "key", "value"), interleaved)
    assert anatomy.unit_features(fused, 0)[2].tolist() == expected
    keys = anatomy.unit_features(fused, 0, block="key")[2]
    assert keys.tolist() == expected[8:16]


def test_gate_and_up_of_a_channel_stand_in_two_blocks():
    anatomy = Anatomy(random_model("phi3"))
    fused = anatomy.family.produces["ffn"][0]
    assert anatomy.unit_features(fused, 0)[[3, 5]].tolist() == [[3, 23], [5, 25]]
    assert anatomy.unit_features(fused, 0, block="up")[[3, 5], 0].tolist() == [23, 25]


def test_grouped_queries_move_with_their_key():
    anatomy = Anatomy(random_model("llama"))
    query, key = anatomy.family.produces["attention"][:2]
    assert anatomy.unit_features(query, 0)[1].tolist() == list(range(16, 32))
    assert anatomy.unit_features(key, 0)[1].tolist() == list(range(8, 16))


def test_an_unknown_architecture_is_told_what_to_do():
    config = GPTJConfig(vocab_size=20, n_embd=8, n_layer=1, n_head=2, rotary_dim=4)
    with pytest.raises(ValueError, match=r"'gptj' is not supported.*llama.*FAMILIES"):
        lab.describe(AutoModelForCausalLM.from_config(config))


def test_positions_of_all_units_cover_every_feature(model):
    anatomy = Anatomy(model)
    for site in ("ffn", "attention"):
        for projection, side in anatomy.coupled(site):
            axis = weight_axis(module := anatomy.module(0, projection), side)
            found = anatomy.unit_features(projection, 0).ravel()
            assert np.array_equal(np.sort(found), np.arange(module.weight.shape[axis]))
