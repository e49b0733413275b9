"""Blocks are scored by what dropping them does, and dropped in that order."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import logits, random_model, windows

import minigpt_lab as lab
from minigpt_lab.calibration import run_decoder, watch
from minigpt_lab.models import SITES, Anatomy, keep_all


def table(rows) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["layer", "site", "influence"])


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi", "bloom", "gpt2", "opt_350m"])
def test_influence_is_what_the_mask_of_a_block_does(family):
    model, batches = random_model(family), windows(count=1)
    anatomy = Anatomy(model)
    found = lab.block_influence(model, batches, sites=SITES).set_index(["layer", "site"])
    outputs = []

    def run() -> torch.Tensor:
        """Output of layer 0 over the window."""
        watching = watch({"": anatomy.layers[0]}, after=lambda *args: outputs.append(args[-1]))
        with torch.no_grad(), watching:
            run_decoder(model, batches[0]["input_ids"])
        return outputs.pop()

    dense = run()
    for site in SITES:
        keep = keep_all(anatomy, [site])
        keep[site][0] = []
        with lab.masked(model, lab.PruningPlan("", {site: anatomy.units(site)}, keep)):
            without = run()
        expected = 1 - torch.cosine_similarity(without, dense, dim=-1).mean().item()
        assert found.loc[(0, site), "influence"] == pytest.approx(expected, abs=1e-6)
        assert expected > 1e-4


def test_the_lowest_are_dropped_and_dropped_blocks_are_not_scored_again(family):
    model, batches = random_model(family), windows(count=2)
    influence = lab.block_influence(model, batches, sites=("ffn", "attention"))
    plan = lab.plan_dropping(model, influence, count=2)
    assert "none left in" in repr(plan)
    mini = lab.shrink(model, plan)
    lowest = influence.nsmallest(2, "influence")
    for site in SITES:
        layers = sorted(lowest["layer"][lowest["site"] == site])
        assert [i for i, n in enumerate(Anatomy(mini).units(site)) if not n] == layers
        assert plan.origin["dropped"][site] == layers
    assert lab.model_size(mini) == plan.predicted_size(model)
    again = lab.block_influence(mini, batches, sites=("ffn", "attention", "layer"))
    assert len(again) == 3 + len(influence) - 2
    assert not again.merge(lowest, on=["layer", "site"]).size


def test_whole_layers_and_a_share_of_the_decoder():
    model = random_model("llama")
    influence = table([(0, "layer", 0.5), (1, "layer", 0.1), (2, "layer", 0.3)])
    for count, layers in ((1, [1]), (2, [1, 2])):
        plan = lab.plan_dropping(model, influence, count=count)
        assert plan.origin["dropped"] == {"ffn": layers, "attention": layers}
    size = plan.predicted_size(model)
    share = 1 - size.layer_ratio
    for ratio, expected in ((share - 1e-4, 2), (share + 1e-4, None), (0.01, 1)):
        if expected is None:
            with pytest.raises(ValueError, match="FFN of every layer"):
                lab.plan_dropping(model, influence, ratio=ratio)
        else:
            dropped = lab.plan_dropping(model, influence, ratio=ratio).origin["dropped"]
            assert len(dropped["ffn"]) == expected


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([(0, "layer", 0.1)], {}, "exactly one of count, ratio"),
        ([(0, "layer", 0.1)], {"count": 2}, "the 1 rows of influence hold"),
        ([(0, "layer", 0.1), (0, "ffn", 0.2)], {"count": 1}, "two rows of a block of layer 0"),
        ([(3, "ffn", 0.1)], {"count": 1}, "layer 3's 'ffn'; expected"),
        ([(0, "heads", 0.1)], {"count": 1}, "'heads'; expected"),
        ([(0, "ffn", np.nan)], {"count": 1}, "expected finite"),
        ([], {"count": 1}, "has 0 rows"),
    ],
)
def test_what_cannot_be_dropped_is_refused(rows, options, message):
    with pytest.raises(ValueError, match=message):
        lab.plan_dropping(random_model("llama"), table(rows), **options)


def test_a_model_without_some_blocks_is_scored_and_pruned_like_any_other(model):
    """Statistics, every criterion, thresholds, SlimGPT and the search pass over such blocks."""
    batches = windows()
    influence = table([(0, "attention", 0.1), (2, "ffn", 0.2)])
    mini = lab.shrink(model, lab.plan_dropping(model, influence, count=2))
    statistics = lab.collect_statistics(mini, batches, progress=False)
    plans = {
        name: lab.plan_from_scores(mini, lab.score(mini, name, batches), ratio=0.3)
        for name in lab.CRITERIA
    }
    plans["contextual"] = lab.contextual_plan(mini, statistics, quantile=0.3)
    counts = lab.search_counts(mini, batches, ratio=0.3, rounds=1, steps=4, progress=False)
    for name, target in (("slimgpt", {"ratio": 0.3}), ("search", {"counts": counts})):
        pruned, plans[name] = lab.slimgpt(mini, batches, **target, progress=False)
        assert lab.model_size(pruned).stored == plans[name].predicted_size(mini).stored
    probe = batches[0]["input_ids"]
    for name, plan in plans.items():
        assert plan.keep["attention"][0] == plan.keep["ffn"][2] == [], name
        assert sum(map(sum, plan.removed.values())) > 0, name
        with lab.masked(mini, plan):
            expected = logits(mini, probe)
        small = lab.shrink(mini, plan)
        torch.testing.assert_close(logits(small, probe), expected, atol=1e-4, rtol=1e-4)
    name = next(name for _, name, module in Anatomy(mini).linears() if not module.weight.numel())
    with pytest.raises(ValueError, match="its block was dropped"):
        lab.collect_hessians(mini, batches, [name])
