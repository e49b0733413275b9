"""Declarative entries: layouts of units, what can be pruned, and what is not supported."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import random_model
from transformers import AutoModelForCausalLM, GPTNeoXConfig

import minigpt_lab as lab
from minigpt_lab.families import Anatomy, Projection
from minigpt_lab.plan import whole


def test_units_and_costs_match_the_model(model):
    anatomy = Anatomy(model)
    dense = sum(p.numel() for p in model.parameters())
    for site in ("ffn", "attention"):
        keep = whole(anatomy)
        keep[site][1] = keep[site][1][1:]
        plan = lab.PruningPlan("", anatomy.layer_widths(), keep)
        mini = lab.shrink(model, plan)
        lost = dense - sum(p.numel() for p in mini.parameters())
        assert lost == anatomy.unit_parameters(site, 1)


def test_describe_names_units_and_shares(model):
    table = lab.describe(model).set_index("site")
    grouped = Anatomy(model).queries_per_group > 1
    assert table.loc["attention", "unit"] == ("key/value group" if grouped else "head")
    assert table.loc["ffn", "units_per_layer"] == "20"
    mini = lab.shrink(model, _fewer_tokens(model))
    cost = int(table.loc["vocabulary", "parameters_per_unit"])
    assert lab.model_size(model).stored - lab.model_size(mini).stored == 7 * cost
    assert 0 < table["share_of_model"].sum() < 1
    mini = lab.shrink(model, _narrower(model))
    assert lab.describe(mini).set_index("site").loc["ffn", "units_per_layer"] == "19–20"


def _fewer_tokens(model):
    return lab.PruningPlan("", {}, {}, vocabulary_size=97, vocabulary=list(range(90)))


def _narrower(model):
    anatomy = Anatomy(model)
    keep = {"ffn": [list(range(20)), list(range(19)), list(range(20))]}
    return lab.PruningPlan("", {"ffn": anatomy.units("ffn")}, keep)


@pytest.mark.parametrize(
    ("interleaved", "expected"),
    [(False, [4, 5, 12, 13, 20, 21]), (True, [12, 13, 14, 15, 16, 17])],
)
def test_fused_projections_find_the_rows_of_a_head(interleaved, expected):
    anatomy = Anatomy(random_model("opt"))
    anatomy.head_dim, anatomy.queries_per_group = 2, 1
    fused = Projection("qkv", ("query", "key", "value"), interleaved)
    assert anatomy.positions(fused, [2], total=4).tolist() == expected
    keys = anatomy.positions(fused, [2], total=4, block="key")
    assert keys.tolist() == expected[2:4]


def test_grouped_queries_move_with_their_key():
    anatomy = Anatomy(random_model("llama"))
    query, key = anatomy.family.produces["attention"][:2]
    assert anatomy.positions(query, [1], 2).tolist() == list(range(16, 32))
    assert anatomy.positions(key, [1], 2).tolist() == list(range(8, 16))


def test_an_unknown_architecture_is_told_what_to_do():
    config = GPTNeoXConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"'gpt_neox' is not supported.*llama.*FAMILIES"):
        lab.describe(AutoModelForCausalLM.from_config(config))


def test_positions_of_all_units_cover_every_feature(model):
    anatomy = Anatomy(model)
    for site in ("ffn", "attention"):
        for projection, side in anatomy.coupled(site):
            module = anatomy.module(0, projection)
            total = anatomy.units(site)[0]
            found = anatomy.positions(projection, list(range(total)), total)
            width = module.out_features if side == "output" else module.in_features
            assert np.array_equal(np.sort(found), np.arange(width))
