"""Speed in PyTorch and in llama.cpp: rows, turns, and a machine without llama.cpp."""

from __future__ import annotations

import sys

import pytest
import torch

import minigpt_lab as lab
from minigpt_lab import studies
from minigpt_lab.studies import runtimes

HOW = {"seq_len": 48, "new_tokens": 4, "repeats": 2, "progress": False}


@pytest.fixture
def models(tiny):
    """Dense, and far smaller with a trimmed vocabulary."""
    plan = lab.plan_from_scores(tiny[0], lab.score(tiny[0], "magnitude"), ratio=0.5)
    return {"dense": tiny[0], "half": lab.shrink(tiny[0], plan)}


def test_every_model_in_pytorch_and_in_every_format(tiny, models):
    pytest.importorskip("xllamacpp")
    threads = torch.get_num_threads()
    table = studies.runtime_speeds(*tiny, models=models, kinds=["F16", "Q8_0"], **HOW)
    assert torch.get_num_threads() == threads
    assert table[["model", "runtime"]].values.tolist() == [
        [name, runtime] for name in models for runtime in ("PyTorch", "F16", "Q8_0")
    ]
    assert table["stored"].unique().tolist() == [m.num_parameters() for m in models.values()]
    for part in ("prefill", "decode"):
        assert (table[f"{part}_low"] <= table[part]).all()
        assert (table[part] <= table[f"{part}_high"]).all()
        assert (table[f"{part}_seconds"] > 0).all()


def test_ratios_are_those_of_each_round(tiny, models, monkeypatch):
    """A clock that every token of the dense model takes 3 s, of the other 1 s."""
    now = [0.0]
    monkeypatch.setattr(runtimes.time, "process_time", lambda: now[0])
    monkeypatch.setattr(runtimes.time, "perf_counter", lambda: now[0])

    def runtime(model):
        def run(read, written):
            now[0] += (3.0 if model is tiny[0] else 1.0) * (read + 2 * (written - 1))

        return run

    monkeypatch.setattr(runtimes, "_in_pytorch", runtime)
    table = studies.runtime_speeds(*tiny, models=models, kinds=[], **HOW).set_index("model")
    assert table["prefill"].tolist() == table["decode"].tolist() == [1.0, 3.0]
    assert table["prefill_seconds"].tolist() == [3.0, 1.0]
    assert table["decode_seconds"].tolist() == [6.0, 2.0]


def test_without_llama_cpp_pytorch_alone_is_measured(tiny, models, monkeypatch):
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    with pytest.warns(UserWarning, match="llama.cpp is not measured.*pip install xllamacpp"):
        table = studies.runtime_speeds(*tiny, models=models, **HOW)
    assert table["runtime"].unique().tolist() == ["PyTorch"]


def test_tokens_that_do_not_fit_are_refused(tiny, models):
    with pytest.raises(ValueError, match="tokens do not fit .* choose a smaller seq_len"):
        studies.runtime_speeds(*tiny, models=models, **HOW | {"seq_len": 10**6})
