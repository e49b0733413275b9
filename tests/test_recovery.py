"""Recovery: better on held-out text, zeros kept, the best state kept, and a killed run resumed."""

from __future__ import annotations

import copy
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest
import torch
from torch import nn

import minigpt_lab as lab
from minigpt_lab import recovery

SMALL = {"seq_len": 64, "eval_every": 1024, "tokens": 4096, "eval_characters": 3000}


@pytest.fixture(scope="module")
def pruned(tiny, tiny_domain):
    """A quarter of the channels gone, a quarter of the linear inputs zeroed."""
    model, tokenizer = tiny
    batches = lab.tokenize(tiny_domain.calibration, tokenizer, 64, 1024)
    statistics = lab.collect_statistics(model, batches, progress=False)
    shares = {"activation": 0.25, "linear_input": 0.25}
    return lab.shrink(model, lab.contextual_plan(model, statistics, quantile=shares))


@pytest.fixture
def mini(pruned):
    return copy.deepcopy(pruned)


def zeros(model) -> dict[str, torch.Tensor]:
    return {name: p.detach() == 0 for name, p in model.named_parameters() if (p == 0).any()}


@pytest.mark.parametrize(("method", "rate"), [("full", 1e-3), ("lora", 5e-3)])
def test_a_pruned_model_gets_better_and_its_zeros_stay(mini, tiny, tiny_domain, method, rate):
    _, tokenizer = tiny
    before, names = zeros(mini), [name for name, _ in mini.named_modules()]
    other = lab.load_domain("tiny-games")
    history = lab.recover(
        mini, tokenizer, tiny_domain, method, epochs=2, learning_rate=rate, other=other, **SMALL
    )
    assert history["perplexity"].min() < 0.95 * history["perplexity"][0]
    assert history["step"].tolist() == list(range(0, 4 * len(history), 4))
    assert history["tokens"].iloc[-1] == 8192 == history["step"].iloc[-1] * 256
    assert history[["train_loss", "other_perplexity"]].iloc[1:].notna().all(axis=None)
    assert history.attrs["stopped"] == "finished"
    assert all(torch.equal(mini.get_parameter(name) == 0, mask) for name, mask in before.items())
    # a plain model again, at its best state
    assert [name for name, _ in mini.named_modules()] == names and not mini.training
    assert type(mini.model.layers[0].mlp.up_proj) is nn.Linear
    assert all(p.requires_grad for p in mini.parameters())
    text = lab.excerpt(tiny_domain.validation, max_characters=SMALL["eval_characters"])
    now = lab.perplexity(mini, tokenizer, text, 64).value
    assert now == pytest.approx(history["perplexity"].min(), rel=1e-3)


def test_it_stops_at_the_level_asked_for(mini, tiny, tiny_domain):
    _, tokenizer = tiny
    text = lab.excerpt(tiny_domain.validation, max_characters=SMALL["eval_characters"])
    start = lab.perplexity(mini, tokenizer, text, 64).value
    arguments = {"epochs": 4, "learning_rate": 1e-3, **SMALL}
    history = lab.recover(mini, tokenizer, tiny_domain, stop_at=0.97 * start, **arguments)
    assert history.attrs["stopped"] == "recovered"
    assert history.attrs["recovery_tokens"] == history["tokens"].iloc[-1] < 4 * 4096
    assert history.attrs["recovery_epochs"] == pytest.approx(history["tokens"].iloc[-1] / 4096)
    weights = copy.deepcopy(mini.state_dict())
    again = lab.recover(mini, tokenizer, tiny_domain, stop_at=start, **arguments)
    assert len(again) == 1 and again.attrs["recovery_tokens"] == 0  # met before it began
    assert all(torch.equal(value, mini.state_dict()[name]) for name, value in weights.items())


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_run_that_only_harms_changes_nothing(mini, tiny, tiny_domain, method):
    before = copy.deepcopy(mini.state_dict())
    history = lab.recover(
        mini, tiny[1], tiny_domain, method, epochs=1, learning_rate=30.0, patience=2, **SMALL
    )
    assert history.attrs["stopped"] in ("patience", "diverged", "finished")
    assert history.attrs["best_step"] == 0
    assert all(torch.equal(value, mini.state_dict()[name]) for name, value in before.items())


def test_interrupting_keeps_what_was_reached(mini, tiny, tiny_domain, monkeypatch):
    real, calls = recovery.perplexity, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(recovery, "perplexity", interrupted)
    history = lab.recover(mini, tiny[1], tiny_domain, learning_rate=1e-3, **SMALL)
    assert history.attrs["stopped"] == "interrupted" and len(history) == 3
    text = lab.excerpt(tiny_domain.validation, max_characters=SMALL["eval_characters"])
    now = lab.perplexity(mini, tiny[1], text, 64).value
    assert now == pytest.approx(history["perplexity"].min(), rel=1e-4)


def test_a_killed_run_resumes_to_the_same_curve(tmp_path, pruned, tiny):
    lab.save_model(pruned, tiny[1], tmp_path / "mini")
    script = tmp_path / "run.py"
    script.write_text(f"""
import sys
import minigpt_lab as lab
model, tokenizer = lab.load_model({str(tmp_path / "mini")!r}, device="cpu")
history = lab.recover(model, tokenizer, lab.load_domain("tiny-law"), epochs=3, learning_rate=1e-3,
                      out_dir=sys.argv[1], **{SMALL!r})
history.drop(columns="seconds").to_csv(sys.argv[2], index=False)
""")

    def start(folder: str, out: str) -> subprocess.Popen:
        command = [sys.executable, str(script), str(tmp_path / folder), str(tmp_path / out)]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    killed = start("checkpoints", "none.csv")
    deadline = time.time() + 300
    while not (tmp_path / "checkpoints" / "checkpoint-8" / "trainer_state.json").is_file():
        assert killed.poll() is None and time.time() < deadline
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL and not (tmp_path / "none.csv").exists()
    assert start("checkpoints", "resumed.csv").wait(300) == 0
    assert start("fresh", "whole.csv").wait(300) == 0
    resumed, whole = (pd.read_csv(tmp_path / name) for name in ("resumed.csv", "whole.csv"))
    pd.testing.assert_frame_equal(resumed, whole, rtol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"method": "prayer"}, "unknown method 'prayer'"),
        ({"epochs": 0}, "epochs is 0"),
        ({"learning_rate": -1e-4}, "learning_rate is -0.0001"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"seq_len": 100_000}, "less than one window"),
    ],
)
def test_bad_arguments_are_named(mini, tiny, tiny_domain, arguments, words):
    with pytest.raises(ValueError, match=words):
        lab.recover(mini, tiny[1], tiny_domain, **arguments)
