"""Held-out measurements: the dense decoder reads each text once, whatever is compared with it."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from helpers import CONFIGS, logits, random_model
from tokenizers.processors import TemplateProcessing

import minigpt_lab as lab
from minigpt_lab import studies
from minigpt_lab.domains import window_prefix
from minigpt_lab.studies import held_out as held_out_module
from minigpt_lab.studies.held_out import HeldOut, decoder_runs_once


@pytest.mark.parametrize("family", CONFIGS)
def test_a_second_pass_gives_the_same_logits_without_the_decoder(family):
    model = random_model(family)
    ids = torch.randint(3, 97, (2, 24), generator=torch.Generator().manual_seed(0))
    expected, states = logits(model, ids), {}
    for _ in range(2):
        with decoder_runs_once(model, states):
            assert torch.equal(logits(model, ids), expected)
    with decoder_runs_once(model, states):
        assert torch.equal(logits(model, ids[:1]), logits(model, ids[:1]))  # another window
    assert len(states) in (0, 2)  # 0: the family's head reads its decoder another way
    assert "forward" not in vars(model.base_model)
    assert torch.equal(logits(model, ids), expected)


def test_measured_as_without_the_states(tiny, tiny_domain):
    model, tokenizer = tiny
    held_out = HeldOut(model, tokenizer, [tiny_domain.test], max_tokens=500, seq_len=64, path=None)
    noisy = copy.deepcopy(model)
    with torch.no_grad():
        noisy.model.layers[0].mlp.down_proj.weight.mul_(0.9)
    calls = []
    with model.model.layers[0].register_forward_pre_hook(lambda *_: calls.append(1)):
        first, second = (held_out.measure(noisy) for _ in range(2))
    assert first == second
    assert len(calls) == len(held_out._states)  # each step of windows, once
    text = lab.excerpt(tiny_domain.test, tokenizer, max_tokens=500)
    expected = lab.divergence(
        noisy, model, tokenizer, text, seq_len=64, max_characters=None, progress=False
    )
    assert first["rows"][0]["kl"] == pytest.approx(expected.kl)


def test_results_are_kept_by_what_they_depend_on(tiny, tiny_domain, tmp_path):
    """Another precision, or a tokenizer that begins a text otherwise, is another measurement."""
    model, tokenizer = tiny
    begins = copy.deepcopy(tokenizer)
    single = TemplateProcessing("<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id or 0)])
    begins.backend_tokenizer.post_processor = single
    assert window_prefix(begins) != window_prefix(tokenizer)
    how = {"max_tokens": 256, "seq_len": 64, "path": tmp_path / "cells.json"}
    facts = [
        HeldOut(model, words, [tiny_domain.test], **how, precision=precision).facts
        for words in (tokenizer, begins)
        for precision in ("float32", "bfloat16")
    ]
    assert all(facts.count(each) == 1 for each in facts)


def overflowing(model):
    """A copy that gives NaN in bfloat16, as weights beyond its range do in float16."""
    bad = copy.deepcopy(model)

    def overflow(_module, _inputs, output):
        return output * float("nan") if output.dtype == torch.bfloat16 else output

    bad.model.layers[0].mlp.down_proj.register_forward_hook(overflow)
    return bad


def test_what_is_read_in_float32_moves_the_others_to_it(tiny, tiny_domain, tmp_path):
    """One table, one precision: also if it is continued, and where only one text needs float32."""
    model, tokenizer = tiny
    texts = [tiny_domain.test, lab.load_domain("tiny-games").test]
    how = {"max_tokens": 256, "seq_len": 64, "path": tmp_path / "cells.json"}
    models, calls = {"dense": model, "bad": overflowing(model), "last": model}, []

    def measured(held_out):
        def compute(name):
            calls.append(name)
            return held_out.measure(models[name])

        return [(name, partial(compute, name)) for name in models]

    exact = HeldOut(model, tokenizer, texts, **how | {"path": None}, precision="float32")
    expected = exact.results(measured(exact), "test", "model")
    for computed in (["dense", "bad", "last", "dense"], []):
        calls.clear()
        held_out = HeldOut(model, tokenizer, texts, **how, precision="bfloat16")
        with pytest.warns(UserWarning, match="those that were read in bfloat16 are measured again"):
            results = held_out.results(measured(held_out), "test", "model")
        assert calls == computed
        for result, other in zip(results, expected, strict=True):
            for row, exact_row in zip(result["rows"], other["rows"], strict=True):
                numbers = ("perplexity", "kl", "precision")
                assert [row[name] for name in numbers] == [exact_row[name] for name in numbers]
    held_out = HeldOut(model, tokenizer, texts, **how | {"path": None}, precision="bfloat16")
    held_out.get("dense", partial(held_out.measure, model))
    with (
        pytest.warns(UserWarning, match="all is read again in float32"),
        pytest.raises(ValueError, match="in bfloat16: set MINIGPT_LAB_PRECISION=float32 and call"),
    ):
        held_out.get("bad", partial(held_out.measure, models["bad"]))


def test_a_model_is_measured_in_one_precision_on_all_texts(tiny, tiny_domain, monkeypatch):
    model, tokenizer = tiny
    texts = [tiny_domain.test, lab.load_domain("tiny-games").test]
    held_out = HeldOut(
        model, tokenizer, texts, max_tokens=128, seq_len=64, path=None, precision="bfloat16"
    )
    real = held_out_module.diverging

    def second_text_needs_float32(model, dense, tokenizer, text, **protocol):
        if text.domain == "tiny-games":
            protocol["precision"] = "float32"
        return real(model, dense, tokenizer, text, **protocol)

    monkeypatch.setattr(held_out_module, "diverging", second_text_needs_float32)
    rows = held_out.get("model", partial(held_out.measure, model))["rows"]
    assert [row["precision"] for row in rows] == ["float32"] * 2


def test_a_sweep_over_a_model_that_overflows_is_of_one_precision(tiny, tiny_domain, monkeypatch):
    """Stored in float16, pruned ones overflow: the dense model is measured again too."""
    monkeypatch.delenv("MINIGPT_LAB_PRECISION")
    model, tokenizer = copy.deepcopy(tiny[0]).half(), tiny[1]
    module = model.model.layers[0].mlp.down_proj

    def overflow(layer, _inputs, output):
        pruned = layer is not module
        return output * float("nan") if pruned and output.dtype == torch.float16 else output

    module.register_forward_hook(overflow)
    batches = lab.tokenize(tiny_domain.calibration, tokenizer, seq_len=64, max_tokens=256)
    statistics = lab.collect_statistics(model, batches, progress=False)
    scores = {"wanda": lab.score(model, "wanda", statistics=statistics, sites=("ffn",))}
    how = {"max_tokens": 256, "seq_len": 64}
    with pytest.warns(UserWarning, match="those that were read in float16 are measured again"):
        table = studies.threshold_sweep(
            model, tokenizer, statistics, text=tiny_domain.test,
            epsilons={"activation": [0.05]}, controls=["random"], **how,
        )  # fmt: skip
    assert table["precision"].tolist() == ["float32"] * 2
    methods = {"wanda": studies.Method("wanda")}
    plans = studies.method_plans(
        model, scores, methods=methods, statistics=statistics, ratios=[0.3], sites=["ffn"]
    )
    with pytest.warns(UserWarning, match="those that were read in float16 are measured again"):
        table, losses = studies.method_comparison(
            model, tokenizer, plans, texts=[tiny_domain.test], **how
        )
    assert table["precision"].tolist() == ["float32"] * 2
    assert {loss.precision for loss in losses.values()} == {"float32"}
