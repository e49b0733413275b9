"""Published settings are arguments that the functions take, and do what they say."""

from __future__ import annotations

import copy
import inspect
import json
import math

import pytest

import minigpt_lab as lab


@pytest.mark.parametrize("name", sorted(lab.RECOVERY_PRESETS))
def test_recovery_presets_are_arguments(name):
    preset = lab.RECOVERY_PRESETS[name]
    assert set(preset) <= set(inspect.signature(lab.recover).parameters)
    assert preset["batch_size"] * preset["gradient_accumulation_steps"] == 64


def test_a_preset_recovers(tiny, tiny_domain, tmp_path):
    model, tokenizer = tiny
    plan = lab.plan_from_scores(model, lab.score(model, "magnitude"), ratio=0.1)
    preset = lab.RECOVERY_PRESETS["slimgpt"] | {"seq_len": 32, "eval_every": 2048}
    history = lab.recover(
        lab.shrink(model, plan), tokenizer, tiny_domain, max_tokens=4096, eval_characters=1500,
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


def test_the_learning_rate_falls_as_the_preset_says(tiny, tiny_domain, tmp_path):
    model, tokenizer = tiny
    small = {"max_tokens": 1024, "seq_len": 32, "batch_size": 4, "epochs": 1,
             "gradient_accumulation_steps": 1, "eval_every": 128, "eval_characters": 500,
             "warmup_steps": 0, "progress": False}  # fmt: skip
    for name in ("llm-pruner", "slimgpt"):
        preset = lab.RECOVERY_PRESETS[name] | small
        lab.recover(copy.deepcopy(model), tokenizer, tiny_domain, **preset, out_dir=tmp_path / name)
        states = [json.loads(p.read_text()) for p in (tmp_path / name).rglob("trainer_state.json")]
        rates = {
            row["step"]: row["learning_rate"]
            for row in max((state["log_history"] for state in states), key=len)
            if "learning_rate" in row
        }
        decay = preset.get("lr_scheduler_type", "cosine")
        share = {"linear": lambda s: 1 - s, "cosine": lambda s: (1 + math.cos(math.pi * s)) / 2}
        assert len(rates) > 2
        for step, rate in rates.items():  # the rate of the step before: logged after it was taken
            expected = share[decay]((step - 1) / 8) * preset["learning_rate"]
            assert rate == pytest.approx(expected, rel=1e-6), (name, step)


def test_warm_up_is_counted_in_updates(tiny, tiny_domain):
    with pytest.raises(ValueError, match="warmup_steps is -1"):
        lab.recover(*tiny, tiny_domain, warmup_steps=-1)
