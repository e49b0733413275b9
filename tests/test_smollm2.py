"""The real thing, end to end: SmolLM2-135M, cut for medicine, saved, reloaded."""

from __future__ import annotations

import os

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import minigpt_lab as lab


@pytest.fixture
def all_cores():
    """This one model is large enough for threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count())
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
def test_a_real_model_becomes_a_smaller_real_model(tmp_path, all_cores):
    model, tokenizer = lab.load_model("smollm2-135m")
    assert "4-bit" in lab.label(model)
    assert model.num_parameters() == 134_515_008
    table = lab.describe(model).set_index("site")
    assert table.loc["attention", "unit"] == "key/value group"
    domain = lab.load_domain("medical")
    batches = lab.tokenize(domain.calibration, tokenizer, seq_len=128, max_tokens=2048)
    statistics = lab.collect_statistics(model, batches, progress=False)
    counts = lab.count_tokens([*domain.calibration, *domain.train], tokenizer)
    plan = lab.contextual_plan(
        model, statistics, epsilon_embedding=0.0, quantile=0.1, token_counts=counts
    )
    text = lab.excerpt(domain.test, tokenizer, max_tokens=1024)
    size, protocol = plan.predicted_size(model), {"seq_len": 128}
    assert size.stored < 0.85 * size.dense
    dense = lab.perplexity(model, tokenizer, text, **protocol)
    assert 10 < dense.value < 60
    with lab.masked(model, plan):
        masked = lab.perplexity(model, tokenizer, text, **protocol)
    mini = lab.shrink(model, plan)
    assert lab.model_size(mini).stored == size.stored
    folder = lab.save_model(mini, tokenizer, tmp_path / "mini")
    again, words = lab.load_model(folder)
    reloaded = lab.perplexity(again, words, text, **protocol)
    assert abs(reloaded.value / masked.value - 1) < 1e-4
    assert dense.bits_per_character < reloaded.bits_per_character < 2 * dense.bits_per_character
    plain = AutoModelForCausalLM.from_pretrained(folder)
    ids = AutoTokenizer.from_pretrained(folder)("The patient", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, again.cpu()(ids).logits)
    assert lab.generate(again, words, "The patient was", max_new_tokens=5)
