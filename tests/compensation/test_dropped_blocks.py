"""Whole blocks among what SlimGPT removes."""

from __future__ import annotations

import pytest
import torch
from helpers import CONFIGS, random_model, windows

import minigpt_lab as lab
from minigpt_lab.architectures import ATTENTION_UNITS
from minigpt_lab.models import Anatomy


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_slimgpt_drops_blocks_and_prunes_the_others(family):
    model, batches = random_model(family), windows()
    grouped = max(Anatomy(model).units("balanced_heads")) > 1
    units = "balanced_heads" if grouped else "kv_group"
    heads, channels = Anatomy(model).units(ATTENTION_UNITS[units]), Anatomy(model).units("ffn")
    counts = {ATTENTION_UNITS[units]: [heads[0], 0, 1], "ffn": [3, channels[1], 5]}
    options = {"counts": counts, "units": units, "progress": False, "dtype": torch.float64}
    mini, plan = lab.slimgpt(model, batches, **options)
    assert plan.removed == counts
    assert [n == 0 for n in Anatomy(mini).units("attention")] == [True, False, False]
    assert [n == 0 for n in Anatomy(mini).units("ffn")] == [False, True, False]
    assert lab.model_size(mini).stored == plan.predicted_size(model).stored
    plain, same = lab.slimgpt(model, batches, compensate=False, **options)
    pairs = zip(plain.parameters(), lab.shrink(model, same).parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    errors, uncompensated = plan.origin["error"]["ffn"], same.origin["error"]["ffn"]
    assert errors[0] < uncompensated[0] and errors[1] <= uncompensated[1] == 1


def test_the_bias_makes_up_for_the_mean_of_a_dropped_block():
    model, batches = random_model("opt"), windows()
    counts = {"ffn": [0, 20, 0]}
    mini, plan = lab.slimgpt(model, batches, counts=counts, sites=("ffn",), progress=False)
    statistics = lab.collect_statistics(model, batches, progress=False)
    name = "model.decoder.layers.1.fc2"
    expected = statistics.mean(name, "output", "sum")
    bias = mini.get_submodule(name).bias.detach().double().numpy()
    assert bias == pytest.approx(expected, abs=1e-4)
    assert plan.origin["error"]["ffn"][1] == pytest.approx(1)
