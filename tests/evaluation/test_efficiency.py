"""What a model costs: counted by hand where it can be, and honest where it cannot."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import random_model

import minigpt_lab as lab
from minigpt_lab import figures, studies
from minigpt_lab.evaluation.costs import macs_per_token


def test_multiplications_are_those_of_the_matrices():
    model = random_model("llama")
    ids, config = torch.randint(97, (2, 10)), model.config
    inside = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    width = config.num_attention_heads * config.hidden_size // config.num_attention_heads
    attention = 2 * 10 * width * config.num_hidden_layers  # q·k and weights·v over 10 places
    assert macs_per_token(model, ids) == inside + attention
    assert model.config._attn_implementation == random_model("llama").config._attn_implementation


def test_every_family_is_measured(model, tiny):
    table = lab.efficiency(model, tiny[1], seq_len=8, new_tokens=2, repeats=1)
    row = table.iloc[0]
    assert len(table) == 1 and row["variant"] == "model"
    assert row["stored"] == sum(p.numel() for p in model.parameters())
    assert row["weight_bytes"] == 4 * row["stored"]
    assert row["prefill_seconds"] > 0 and row["decode_tokens_per_second"] > 0
    assert math.isnan(row["peak_bytes"]) or row["peak_bytes"] >= row["weight_bytes"]


def test_a_cut_model_beside_the_dense_one(tiny):
    model, tokenizer = tiny
    scores = lab.score(model, "magnitude")
    mini = lab.shrink(model, lab.plan_from_scores(model, scores, ratio=0.5))
    table = lab.efficiency(mini, tokenizer, dense=model, seq_len=64, new_tokens=4, repeats=3)
    dense, cut = table.set_index("variant").loc[["dense", "model"]].to_dict("records")
    assert cut["stored"] < dense["stored"] and cut["macs_per_token"] < dense["macs_per_token"]
    assert dense["prefill_speedup"] == dense["mac_reduction"] == dense["realised"] == 1
    assert cut["mac_reduction"] == dense["macs_per_token"] / cut["macs_per_token"]
    assert cut["realised"] == pytest.approx(cut["prefill_speedup"] / cut["mac_reduction"])
    assert cut["prefill_low"] <= cut["prefill_seconds"] <= cut["prefill_high"]


def test_speeds_are_drawn(tiny):
    model, tokenizer = tiny
    table = lab.efficiency(model, tokenizer, dense=model, seq_len=32, new_tokens=2, repeats=2)
    long = studies.throughput_rates(table)
    assert list(long["kind"]) == ["prefill"] * 2 + ["decode"] * 2
    assert (long["low"] <= long["tokens_per_second"] * 1.0001).all()
    assert (long["high"] >= long["tokens_per_second"] * 0.9999).all()
    assert len(figures.throughput(long).axes) == 2


def test_the_model_is_left_as_it_was(tiny):
    model, tokenizer = tiny
    model.train()
    lab.efficiency(model, tokenizer, seq_len=8, new_tokens=1, repeats=1)
    assert model.training
    model.eval()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"repeats": 0}, "repeats is 0"),
        ({"seq_len": 10_000}, "do not fit tiny-llama"),
        ({"seq_len": None}, "seq_len is None"),
        ({"new_tokens": 1.5}, "new_tokens is 1.5"),
        ({"batch_size": -1}, "batch_size is -1"),
        ({"dense": "tiny-llama"}, "dense is 'tiny-llama'"),
    ],
)
def test_bad_counts_are_named(tiny, arguments, words):
    with pytest.raises(ValueError, match=words):
        lab.efficiency(*tiny, **arguments)
