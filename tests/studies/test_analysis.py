"""Overlap against chance, controls of equal size, sweeps that resume."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import random_model, random_plan

import minigpt_lab as lab
from minigpt_lab import studies
from minigpt_lab.studies import activations, analysis, held_out


@pytest.fixture(scope="module")
def draws(tiny):
    model, tokenizer = tiny
    found = {}
    for name in ("tiny-law", "tiny-games"):
        batches = lab.tokenize(
            lab.load_domain(name).calibration, tokenizer, seq_len=64, max_tokens=2048
        )
        found[name] = [
            lab.collect_statistics(model, half, progress=False) for half in batches.samples()
        ]
    return found


def test_domains_differ_more_than_draws_do(draws):
    table = activations.neuron_overlap(draws, quantile=0.3).set_index(["domain", "other"])
    within = table.loc[("tiny-law", "tiny-law"), "jaccard"]
    between = table.loc[("tiny-law", "tiny-games"), "jaccard"]
    assert within > between + 0.1 > table["chance"].max()
    assert table["chance"].between(0.15, 0.2).all()
    assert np.allclose(table["unused"], 0.3, atol=0.01)


def test_chance_is_what_random_sets_give():
    rng = np.random.default_rng(0)
    sets = [[rng.random(2000) < 0.3 for _ in range(5)] for _ in range(2)]
    observed, expected = activations._jaccard(*sets)
    assert observed == pytest.approx(expected, abs=0.01)
    assert expected == pytest.approx(0.3 / (2 - 0.3), abs=0.01)


def test_the_kept_set_settles_as_text_grows(draws):
    table = activations.calibration_stability(draws, 0.3)
    for domain, rows in table.groupby("domain"):
        assert list(rows["tokens"]) == [1024, 2048]
        assert rows["jaccard"].iloc[0] < rows["jaccard"].iloc[1] == 1, domain
        assert (rows["jaccard"] > rows["chance"] + 0.1).all()
    assert table["chance"].between(0.53, 0.56).all()  # 0.7 / (2 - 0.7)


def test_overlap_needs_one_rule_and_two_draws(draws):
    with pytest.raises(ValueError, match="epsilon or quantile"):
        activations.neuron_overlap(draws)
    with pytest.raises(ValueError, match="with at least 2"):
        activations.neuron_overlap({"a": draws["tiny-law"][:1]}, quantile=0.1)


@pytest.mark.parametrize("control", ["random", "magnitude"])
def test_controls_have_exactly_the_same_size(model, control):
    plan = random_plan(model, 21)
    matched = analysis.matched_plan(model, plan, control)
    assert matched.predicted_size(model).stored == plan.predicted_size(model).stored
    counts = [
        {name: {s: len(v) for s, v in sides.items() if v} for name, sides in p.zero.items()}
        for p in (plan, matched)
    ]
    assert counts[0] == counts[1] and matched.removed == plan.removed
    assert matched.keep != plan.keep
    with pytest.raises(ValueError, match="criterion is 'wanda'; expected one of"):
        analysis.matched_plan(model, plan, "wanda")


def test_a_sweep_resumes_where_it_stopped(tmp_path, tiny, draws, monkeypatch):
    model, tokenizer = tiny
    texts = lab.load_domain("tiny-law").test
    statistics = draws["tiny-law"][0] + draws["tiny-law"][1]

    def sweep(seeds=(0,), **epsilons):
        return analysis.threshold_sweep(
            model, tokenizer, statistics, text=texts, epsilons=epsilons, out_dir=tmp_path,
            seeds=seeds, seq_len=64, max_tokens=256,
        )  # fmt: skip

    first = sweep(activation=[0.05])
    assert (tmp_path / "sweep.json").is_file()
    measured = []
    real = held_out.diverging
    monkeypatch.setattr(held_out, "diverging", lambda *a, **k: measured.append(1) or real(*a, **k))
    second = sweep(activation=[0.05, 0.1])
    assert len(measured) == 3  # 0.1: contextual and two controls
    assert second.iloc[:3].reset_index(drop=True).equals(first)
    assert set(second["method"]) == {"contextual", "random", "magnitude"}
    seeded = sweep(activation=[0.05], seeds=(0, 1))
    assert list(seeded["method"]) == ["contextual", "random", "random", "magnitude"]
    assert list(seeded["seed"]) == [0, 0, 1, 0] and len(measured) == 4  # the second seed is new
    assert seeded["stored"].nunique() == 1 and seeded["perplexity"].nunique() == 4
    with pytest.raises(ValueError, match="a key of epsilons is 'activations'; .*did you mean"):
        sweep(activations=[0.1])
    with pytest.raises(ValueError, match="expected at least one threshold"):
        sweep(linear=[], all=[])


def test_activation_frame_has_a_row_per_neuron(draws, tiny):
    frame = activations.activation_frame({name: two[0] for name, two in draws.items()})
    assert len(frame) == 2 * 4 * 384


@pytest.mark.parametrize("family", ["llama", "opt", "bloom"])
def test_budget_counts_every_parameter_once(family):
    model = random_model(family)
    table = studies.parameter_budget(model, "dense")
    assert table["parameters"].sum() == sum(p.numel() for p in model.parameters())
    mini = lab.shrink(model, random_plan(model, 22))
    parts = studies.parameter_budget(mini, "mini").set_index("part")["parameters"]
    assert parts.sum() == lab.model_size(mini).stored
    assert parts["ffn"] < table.set_index("part").loc["ffn", "parameters"]
