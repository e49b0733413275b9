"""Reading in bfloat16: close numbers, the model untouched, one switch, clear errors."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from helpers import CONFIGS, logits, random_model, random_plan

import minigpt_lab as lab
from minigpt_lab.models import has_fast_bfloat16, inference, reading_dtype


def bits(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def unchanged(model, before: dict[str, torch.Tensor]) -> bool:
    after = dict(model.named_parameters())
    return all(
        after[name].dtype == old.dtype and torch.equal(after[name], old)
        for name, old in before.items()
    )


@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_masked_or_not_reads_in_bfloat16_and_is_left_as_it_was(family):
    model = random_model(family)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.3)  # logits of a few units, as those of trained models
    ids = torch.randint(3, 97, (2, 24), generator=torch.Generator().manual_seed(0))
    before = bits(model)
    with lab.masked(model, random_plan(model, seed=1)):
        exact = logits(model, ids)
        with inference(model, "bfloat16"):
            assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
            rounded = logits(model, ids)
    assert unchanged(model, before)
    kept = torch.isfinite(exact)
    assert torch.equal(kept, torch.isfinite(rounded))
    difference = (exact - rounded.float())[kept]
    assert difference.abs().max() > 0  # it was bfloat16
    assert difference.square().mean().sqrt() < 0.05 * exact[kept].std()


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("precision", ["auto", "bfloat16", "float32"])
def test_every_stored_type_under_every_precision(tiny, tiny_domain, stored, precision, monkeypatch):
    monkeypatch.delenv("MINIGPT_LAB_PRECISION")
    model, tokenizer = copy.deepcopy(tiny[0]).to(getattr(torch, stored)), tiny[1]
    before, text = bits(model), tiny_domain.test
    found = lab.perplexity(
        model, tokenizer, text, max_tokens=512, precision=precision, progress=False
    )
    automatic = "bfloat16" if stored == "float32" and has_fast_bfloat16("cpu") else stored
    expected = automatic if precision == "auto" else precision
    assert found.precision == expected and found.protocol.endswith(expected)
    exact = lab.perplexity(*tiny, text, max_tokens=512, precision="float32", progress=False)
    assert found.value == pytest.approx(exact.value, rel=0.01)
    assert unchanged(model, before)


def test_the_environment_variable_stands_for_auto(tiny, monkeypatch):
    model = tiny[0]
    for value, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        monkeypatch.setenv("MINIGPT_LAB_PRECISION", value)
        assert reading_dtype(model) == dtype
        assert reading_dtype(model, "float32") == torch.float32  # an argument counts more
    monkeypatch.delenv("MINIGPT_LAB_PRECISION")
    fast = has_fast_bfloat16("cpu")
    assert reading_dtype(model) == (torch.bfloat16 if fast else torch.float32)
    monkeypatch.setenv("MINIGPT_LAB_PRECISION", "half")
    with pytest.raises(ValueError, match="MINIGPT_LAB_PRECISION is 'half'; expected auto"):
        reading_dtype(model)


def test_a_device_without_bfloat16_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    from minigpt_lab.models.precision import product_dtype

    device = torch.device("cuda")
    with pytest.raises(ValueError, match="precision is 'bfloat16', which cuda does not have"):
        product_dtype(device, "bfloat16")
    assert product_dtype(device) == torch.float32


def test_nan_in_bfloat16_is_read_again_in_float32(tiny, tiny_domain):
    model, tokenizer = copy.deepcopy(tiny[0]), tiny[1]
    options = {"max_tokens": 256, "progress": False}
    exact = lab.perplexity(model, tokenizer, tiny_domain.test, precision="float32", **options)
    down = model.model.layers[0].mlp.down_proj

    def break_low_precision(module, args, output):
        return output * float("nan") if output.dtype == torch.bfloat16 else output

    with down.register_forward_hook(break_low_precision), pytest.warns(match="in bfloat16; all is"):
        found = lab.perplexity(model, tokenizer, tiny_domain.test, precision="bfloat16", **options)
    assert (found.value, found.precision) == (exact.value, "float32")
    with (
        down.register_forward_hook(lambda module, args, output: output * float("nan")),
        pytest.warns(match="in bfloat16"),
        pytest.raises(ValueError, match="gives NaN on tiny-law"),
    ):
        lab.perplexity(model, tokenizer, tiny_domain.test, precision="bfloat16", **options)


def test_statistics_in_bfloat16_are_close_and_kept_apart(tiny, tiny_domain, tmp_path):
    model, tokenizer = tiny
    batches = lab.tokenize(tiny_domain.calibration, tokenizer, seq_len=64, max_tokens=1024)
    options = {"path": tmp_path / "sums.safetensors", "progress": False}
    exact = lab.collect_statistics(model, batches, precision="float32", **options)
    rounded = lab.collect_statistics(model, batches, precision="bfloat16", **options)
    assert (exact.precision, rounded.precision) == ("float32", "bfloat16")
    for module, side in exact.sides():
        expected = exact.mean(module, side, "absolute")
        error = np.abs(rounded.mean(module, side, "absolute") - expected)
        assert error.max() > 0 and error.mean() < 0.02 * expected.mean()
    again = lab.collect_statistics(model, batches, precision="bfloat16", **options)
    assert all(np.array_equal(again.sums[key], rounded.sums[key]) for key in rounded.sums)
    with pytest.raises(ValueError, match="read in float32 and bfloat16 cannot be added"):
        exact + rounded


def test_answers_in_bfloat16(tiny, tiny_domain):
    questions = tiny_domain.questions[:20]
    exact = lab.answer_questions(*tiny, questions, precision="float32", progress=False)
    rounded = lab.answer_questions(*tiny, questions, precision="bfloat16", progress=False)
    assert rounded.precision == "bfloat16"
    ratio = rounded.frame["nll"] / exact.frame["nll"]
    assert 0 < np.abs(ratio - 1).max() < 0.05
    with pytest.raises(ValueError, match="differ in precision: float32 and bfloat16"):
        lab.compare_answers(exact, rounded)


def test_recovery_under_autocast_trains_float32_weights(tiny, tiny_domain):
    options = {"max_tokens": 2048, "seq_len": 64, "learning_rate": 1e-3, "progress": False}
    losses = {}
    for precision in ("float32", "bfloat16"):
        model = copy.deepcopy(tiny[0])
        history = lab.recover(model, tiny[1], tiny_domain, precision=precision, **options)
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        losses[precision] = history["perplexity"].to_numpy()
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.02)
    assert (losses["bfloat16"] != losses["float32"]).any()
