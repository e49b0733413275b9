"""Published settings are arguments that the functions take, and do what they say."""

from __future__ import annotations

import inspect

import pytest

import minigpt_lab as lab
from minigpt_lab.presets import UNPUBLISHED


@pytest.mark.parametrize("name", sorted(lab.RECOVERY_PRESETS))
def test_recovery_presets_are_arguments(name):
    preset = lab.RECOVERY_PRESETS[name]
    assert set(preset) <= set(inspect.signature(lab.recover).parameters)
    assert preset["batch_size"] * preset["accumulation"] == 64
    assert set(UNPUBLISHED.get(name, ())) <= set(preset)


def test_a_preset_recovers(tiny, tiny_domain, tmp_path):
    model, tokenizer = tiny
    plan = lab.plan_from_scores(model, lab.score("magnitude", model), ratio=0.1)
    preset = lab.RECOVERY_PRESETS["slimgpt"] | {"seq_len": 32, "eval_every": 2048}
    history = lab.recover(
        lab.shrink(model, plan), tokenizer, tiny_domain, tokens=4096, eval_characters=1500,
        progress=False, **preset,
    )  # fmt: skip
    assert history["tokens"].iloc[-1] == 4096 and history["step"].iloc[-1] == 2


@pytest.mark.parametrize("name", sorted(lab.PERPLEXITY_PRESETS))
def test_perplexity_presets_are_protocols(name, tiny, tiny_domain):
    preset = lab.PERPLEXITY_PRESETS[name]
    assert set(preset) <= set(inspect.signature(lab.perplexity).parameters)
    found = lab.perplexity(*tiny, tiny_domain.test, **{**preset, "seq_len": 64})
    assert "windows of 64, stride 64, whole windows only" in found.protocol
    assert found.tokens % 63 == 0  # the first token of each window is not scored


def test_warm_up_is_counted_in_updates(tiny, tiny_domain):
    with pytest.raises(ValueError, match="warmup is -1"):
        lab.recover(*tiny, tiny_domain, warmup=-1)
