"""What a GPU computes is what the CPU computes, up to rounding."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from helpers import random_plan

import minigpt_lab as lab
from minigpt_lab.recovery.distillation import DistillationLoss, Teacher

pytestmark = pytest.mark.gpu
DEVICE = "cuda"


@pytest.fixture
def pair(tiny):
    """The tiny trained Llama on the CPU and on the GPU."""
    model, _ = tiny
    return model, copy.deepcopy(model).to(DEVICE)


@pytest.fixture
def batches(tiny, tiny_domain):
    _, tokenizer = tiny
    return list(lab.tokenize(tiny_domain.calibration, tokenizer, seq_len=64, max_tokens=512))


def test_masked_shrunk_and_the_cpu_agree(model, probe):
    on_gpu, plan = copy.deepcopy(model).to(DEVICE), random_plan(model, 3, vocabulary=False)
    with torch.no_grad(), lab.masked(model, plan):
        expected = model(input_ids=probe).logits
    with torch.no_grad(), lab.masked(on_gpu, plan):
        masked = on_gpu(input_ids=probe.to(DEVICE)).logits
    mini = lab.shrink(on_gpu, plan)
    with torch.no_grad():
        shrunk = mini(input_ids=probe.to(DEVICE)).logits
    assert {p.device.type for p in mini.parameters()} == {DEVICE}
    torch.testing.assert_close(masked.cpu(), expected, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(shrunk, masked, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("criterion", ["magnitude", "contextual", "wanda", "fluctuation", "taylor"])
def test_scores_agree(pair, batches, criterion):
    on_cpu, on_gpu = (lab.score(model, criterion, batches) for model in pair)
    for site, layers in on_cpu.values.items():
        for expected, found in zip(layers, on_gpu.values[site], strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-2, atol=1e-4 * expected.std())


def test_perplexity_agrees(pair, tiny, tiny_domain):
    _, tokenizer = tiny
    on_cpu, on_gpu = (
        lab.perplexity(model, tokenizer, tiny_domain.test, seq_len=64, max_tokens=1024)
        for model in pair
    )
    assert on_gpu.value == pytest.approx(on_cpu.value, rel=1e-3)


def test_slimgpt_is_as_good(pair, batches, tiny, tiny_domain):
    """Equal scores may be ordered otherwise, so the models are compared by what they know."""
    _, tokenizer = tiny
    on_cpu, on_gpu = (
        lab.perplexity(
            lab.slimgpt(model, batches, ratio=0.3, progress=False)[0],
            tokenizer,
            tiny_domain.test,
            seq_len=64,
            max_tokens=1024,
        )
        for model in pair
    )
    assert on_gpu.value == pytest.approx(on_cpu.value, rel=0.02)


def test_a_model_is_offloaded_from_the_gpu_and_comes_back(batches, pair):
    _, model = pair
    straight, plan = lab.slimgpt(model, batches, ratio=0.3, progress=False)
    offloaded, same = lab.slimgpt(model, batches, ratio=0.3, offload="cpu", progress=False)
    assert plan.keep == same.keep
    for a, b in zip(straight.parameters(), offloaded.parameters(), strict=True):
        torch.testing.assert_close(a.cpu(), b.cpu(), atol=1e-4, rtol=1e-3)


def test_recovery_and_saving(pair, tiny, tiny_domain, tmp_path):
    _, tokenizer = tiny
    model = lab.shrink(pair[1], random_plan(pair[1], 3, vocabulary=False))
    before = lab.perplexity(model, tokenizer, tiny_domain.test, max_tokens=1024)
    lab.recover(model, tokenizer, tiny_domain, max_tokens=4096, seq_len=64, progress=False)
    after = lab.perplexity(model, tokenizer, tiny_domain.test, max_tokens=1024)
    assert after.value < before.value
    again, words = lab.load_model(lab.save_model(model, tokenizer, tmp_path / "mini"))
    loaded = lab.perplexity(again, words, tiny_domain.test, max_tokens=1024)
    assert loaded.value == pytest.approx(after.value, rel=1e-3)


@pytest.mark.parametrize("samples", [None, 16])
def test_the_loss_of_a_teacher_agrees(pair, batches, samples):
    """And its gradient: a GPU takes larger blocks of positions. Sampled tokens differ a little."""
    found, ids, plan = [], batches[0]["input_ids"], random_plan(pair[0], 3, vocabulary=False)
    for model in pair:
        student, here = lab.shrink(model, plan), ids.to(model.device)
        outputs = student(input_ids=here)
        guide = Teacher(model, student, temperature=2.0, samples=samples and 512 * samples)
        loss = DistillationLoss(guide, 0.5)(outputs, here, num_items_in_batch=torch.tensor(100))
        gradient = torch.autograd.grad(loss, student.model.norm.weight)[0]
        found.append((loss.detach(), gradient.cpu()))
    (on_cpu, expected), (on_gpu, gradient) = found
    assert float(on_gpu) == pytest.approx(float(on_cpu), rel=0.02 if samples else 1e-4)
    rounding = 0.1 if samples else 1e-3
    assert (gradient - expected).norm() < rounding * expected.norm()


@pytest.mark.parametrize(
    "options", [{}, {"teacher_samples": 16}, {"method": "lora", "lora_dropout": 0.0}], ids=str
)
def test_distillation_is_as_good(pair, tiny, tiny_domain, options):
    options = {"loss": "mix", "learning_rate": 1e-3, "precision": "float32", **options}
    options |= {"max_tokens": 4096, "eval_every": 1024, "seq_len": 64, "progress": False}
    plan, curves = random_plan(pair[0], 3, vocabulary=False), []
    for model in pair:
        mini = lab.shrink(model, plan)
        history = lab.recover(mini, tiny[1], tiny_domain, teacher=model, **options)
        assert {p.device.type for p in mini.parameters()} == {model.device.type}
        curves.append(history["perplexity"].tolist())
    assert curves[1] == pytest.approx(curves[0], rel=0.05)
    assert min(curves[1]) < 0.97 * curves[1][0]
