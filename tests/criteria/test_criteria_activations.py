"""Criteria of activations against a few lines of NumPy: Wanda, FLAP, and FLAP's biases."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import CONFIGS, consumer_inputs, logits, random_model, random_plan, units

import minigpt_lab as lab
from minigpt_lab.architectures import SITES
from minigpt_lab.models.anatomy import Anatomy


def test_wanda_is_weights_times_norms(model, probe):
    scores = lab.score(model, "wanda", [{"input_ids": probe}])
    for (site, layer), (weight, x) in consumer_inputs(model, probe).items():
        columns = (np.abs(weight) * np.linalg.norm(x, axis=0)).mean(0)
        found = scores.values[site][layer]
        np.testing.assert_allclose(found, units(columns, len(found)), rtol=1e-4)


def test_sequential_wanda_reads_what_pruned_layers_write(model, probe):
    batches = [{"input_ids": probe}]
    before = copy.deepcopy(model.state_dict())
    scores = lab.score(model, "wanda", batches, sequential=0.5)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    dense = lab.score(model, "wanda", batches)
    np.testing.assert_allclose(scores.values["ffn"][0], dense.values["ffn"][0], rtol=1e-4)
    assert not np.allclose(scores.values["ffn"][2], dense.values["ffn"][2], rtol=1e-2)
    plan = lab.plan_from_scores(model, scores, ratio=0.5)
    for site in SITES:  # the last layer whole, the others cut
        plan.keep[site][-1] = list(range(plan.units[site][-1]))
    with lab.masked(model, plan):
        inputs = consumer_inputs(model, probe)
    for site in SITES:
        weight, x = inputs[site, 2]
        columns = (np.abs(weight) * np.linalg.norm(x, axis=0)).mean(0)
        found = scores.values[site][2]
        np.testing.assert_allclose(found, units(columns, len(found)), rtol=1e-4)


@pytest.mark.parametrize("metric", ["IFV", "WIFV", "WIFN"])
def test_fluctuation_is_flaps_metric(model, probe, metric):
    model, batches = model.double(), [{"input_ids": probe}]  # near the mean, z is all rounding
    raw = lab.score(model, "fluctuation", batches, metric=metric, standardise=False)
    standard = lab.score(model, "fluctuation", batches, metric=metric)
    for (site, layer), (weight, x) in consumer_inputs(model, probe).items():
        expected = {
            "IFV": x.var(0),
            "WIFV": x.var(0) * (weight**2).sum(0),
            "WIFN": np.abs(weight).mean(0) * np.linalg.norm(x, axis=0),
        }[metric]
        found = raw.values[site][layer]
        np.testing.assert_allclose(found, units(expected, len(found)), rtol=1e-3, atol=1e-7)
        squared = expected**2 if site == "attention" else expected
        z = (squared - squared.mean()) / squared.std(ddof=1)
        per_unit = z.reshape(len(found), -1).mean(1)
        np.testing.assert_allclose(standard.values[site][layer], per_unit, rtol=1e-3, atol=1e-4)


def compensated(model, probe, plan):
    statistics = lab.collect_statistics(model, [{"input_ids": probe}], progress=False)
    return lab.bias_compensated(model, plan, statistics)


def test_compensation_keeps_the_mean_output(model, probe):
    plan = lab.plan_from_scores(model, lab.score(model, "random", sites=("ffn",)), ratio=0.5)
    plan.keep["ffn"][1:] = [list(range(20))] * 2  # the inputs of layer 0 stay what they were
    anatomy = Anatomy(model)
    module = anatomy.module(0, anatomy.family.consumes["ffn"])
    means = {}
    module.register_forward_hook(
        lambda _m, _args, out: means.update(last=out.flatten(0, -2).mean(0))
    )
    for name, context in {
        "dense": None, "cut": plan, "compensated": compensated(model, probe, plan)
    }.items():  # fmt: skip
        if context is None:
            logits(model, probe)
        else:
            with lab.masked(model, context):
                logits(model, probe)
        means[name] = means["last"]
    torch.testing.assert_close(means["compensated"], means["dense"], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(means["cut"], means["dense"], atol=1e-2)


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_masked_shrunk_and_predicted_agree_with_compensation(family, probe):
    model = random_model(family)
    plan = compensated(model, probe, random_plan(model, 11, vocabulary=False))
    before = copy.deepcopy(model.state_dict())
    with lab.masked(model, plan):
        expected = logits(model, probe)
    after = model.state_dict()
    assert list(before) == list(after) and all(torch.equal(before[k], after[k]) for k in before)
    mini = lab.shrink(model, plan)
    torch.testing.assert_close(logits(mini, probe), expected, atol=1e-4, rtol=1e-4)
    without = lab.shrink(model, replace(plan, shift={}))
    assert not torch.allclose(logits(without, probe), expected, atol=1e-2)
    assert plan.predicted_size(model) == lab.model_size(mini, model)
    assert lab.PruningPlan.from_dict(plan.to_dict()) == plan and "bias shifted" in str(plan)
    assert f"pruned to {lab.model_size(mini).stored:,} parameters" in lab.label(mini)


def test_added_biases_are_saved_and_reloaded(tmp_path, tiny, tiny_domain, tiny_statistics):
    model, tokenizer = tiny
    scores = lab.score(model, "fluctuation", statistics=tiny_statistics)
    plan = lab.plan_from_scores(model, scores, ratio=0.3)
    mini = lab.shrink(model, lab.bias_compensated(model, plan, tiny_statistics))
    lab.save_model(mini, tokenizer, tmp_path / "mini")
    again, _ = lab.load_model(tmp_path / "mini", device="cpu")
    ids = torch.arange(20)[None]
    assert torch.equal(logits(again, ids), logits(mini, ids))
    assert lab.model_size(again) == lab.model_size(mini)
    assert lab.label(again).rpartition(",")[2] == lab.label(mini).rpartition(",")[2]
    with pytest.raises(ValueError, match="without portable"):
        lab.save_model(mini, tokenizer, tmp_path / "plain", portable=True)


def test_a_shift_of_another_width_is_refused(model):
    name = Anatomy(model).name(0, Anatomy(model).family.consumes["ffn"])
    plan = replace(random_plan(model, 1), shift={name: [0.0]})
    with pytest.raises(ValueError, match="shifts 1 outputs"):
        lab.shrink(model, plan)
