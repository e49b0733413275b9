"""Recovery: better on held-out text, zeros kept, the best state kept, and a killed run resumed."""

from __future__ import annotations

import copy
import dataclasses
import os
import random
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import random_model
from safetensors.torch import load_file
from torch import nn
from transformers import TrainingArguments

import minigpt_lab as lab
from minigpt_lab.models import precision, runtime
from minigpt_lab.recovery import adapters, training

SMALL = {"seq_len": 64, "eval_every": 1024, "max_tokens": 4096, "eval_characters": 3000}
PLAIN = {"learning_rate": 1e-3, "progress": False, **SMALL}


@pytest.fixture(scope="module")
def pruned(tiny, tiny_domain):
    """A quarter of the channels gone, a quarter of the linear inputs zeroed."""
    model, tokenizer = tiny
    batches = lab.tokenize(tiny_domain.calibration, tokenizer, seq_len=64, max_tokens=1024)
    statistics = lab.collect_statistics(model, batches, progress=False)
    shares = {"activation": 0.25, "linear_input": 0.25}
    return lab.shrink(model, lab.contextual_plan(model, statistics, quantile=shares))


@pytest.fixture
def mini(pruned):
    return copy.deepcopy(pruned)


@pytest.fixture(scope="module")
def whole(pruned, tiny, tiny_domain):
    """An uninterrupted recovery by each method: the model and its history."""
    made = {}
    for method in ("full", "lora"):
        model = copy.deepcopy(pruned)
        made[method] = model, lab.recover(model, tiny[1], tiny_domain, method=method, **PLAIN)
    return made


def zeros(model) -> dict[str, torch.Tensor]:
    return {name: p.detach() == 0 for name, p in model.named_parameters() if (p == 0).any()}


def reached(model, tiny, domain) -> float:
    """The model's perplexity, as recovery measures it."""
    text = lab.excerpt(domain.validation, max_characters=SMALL["eval_characters"])
    return lab.perplexity(model, tiny[1], text, seq_len=64).value


def assert_same_curve(one: pd.DataFrame, other: pd.DataFrame, **tolerance) -> None:
    columns = other.columns.drop("seconds")
    pd.testing.assert_frame_equal(one[columns], other[columns], **tolerance)


def same_weights(model, other) -> bool:
    return all(map(torch.equal, model.state_dict().values(), other.state_dict().values()))


@pytest.mark.parametrize(("method", "rate"), [("full", 1e-3), ("lora", 5e-3)])
def test_a_pruned_model_gets_better_and_its_zeros_stay(mini, tiny, tiny_domain, method, rate):
    _, tokenizer = tiny
    before, names = zeros(mini), [name for name, _ in mini.named_modules()]
    other = lab.load_domain("tiny-games")
    history = lab.recover(
        mini,
        tokenizer,
        tiny_domain,
        method=method,
        epochs=2,
        learning_rate=rate,
        other=other,
        **SMALL,
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
    assert reached(mini, tiny, tiny_domain) == pytest.approx(history["perplexity"].min(), rel=1e-3)


def test_it_stops_at_the_level_asked_for(mini, tiny, tiny_domain):
    _, tokenizer = tiny
    start = reached(mini, tiny, tiny_domain)
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
        mini, tiny[1], tiny_domain, method=method, epochs=1, learning_rate=30.0, patience=2, **SMALL
    )
    assert history.attrs["stopped"] in ("patience", "diverged", "finished")
    assert history.attrs["best_step"] == 0
    assert all(torch.equal(value, mini.state_dict()[name]) for name, value in before.items())


@pytest.fixture
def interrupted(monkeypatch):
    """Ctrl-C during the fourth evaluation: one before training, two with their checkpoints."""
    real, calls = training.perplexity, []

    def perplexity(model, tokenizer, text, **options):
        calls.append(text.domain)
        if calls.count("tiny-law") == 4 and text.domain == "tiny-law":
            raise KeyboardInterrupt
        return real(model, tokenizer, text, **options)

    monkeypatch.setattr(training, "perplexity", perplexity)


@pytest.mark.usefixtures("interrupted")
def test_interrupting_keeps_what_was_reached(mini, tiny, tiny_domain):
    history = lab.recover(mini, tiny[1], tiny_domain, learning_rate=1e-3, **SMALL)
    assert history.attrs["stopped"] == "interrupted" and len(history) == 3
    assert reached(mini, tiny, tiny_domain) == pytest.approx(history["perplexity"].min(), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"general": "tiny-games", "generality": 0.5},
        {"method": "lora", "loss": "kl"},
        {"method": "lora", "loss": "mix", "teacher_samples": 4, "general": "tiny-games"},
    ],
    ids=str,
)
@pytest.mark.usefixtures("interrupted")
def test_an_interrupted_run_resumes_to_the_same_curve(tmp_path, pruned, tiny, tiny_domain, options):
    given = {**PLAIN, "epochs": 2, **options}
    if "general" in given:
        given["general"] = lab.load_domain(given["general"])
    if "loss" in given:
        given["teacher"] = tiny[0]
    models = [copy.deepcopy(pruned) for _ in range(3)]
    stopped, resumed, whole = (
        lab.recover(model, tiny[1], tiny_domain, out_dir=folder, **given)
        for model, folder in zip(models, (tmp_path, tmp_path, None), strict=True)
    )
    assert stopped.attrs["stopped"] == "interrupted" and len(stopped) == 3
    assert resumed.attrs == whole.attrs and len(resumed) > 5
    assert_same_curve(resumed, whole)
    assert same_weights(*models[1:])


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"loss": "mix", "teacher_samples": 8}])
def test_a_killed_run_resumes_to_the_same_curve(tmp_path, pruned, tiny, tiny_domain, options):
    lab.save_model(pruned, tiny[1], tmp_path / "mini")
    given, out = {"epochs": 2, **PLAIN, **options}, tmp_path / "checkpoints"
    script = f"""
import minigpt_lab as lab
model, tokenizer = lab.load_model({str(tmp_path / "mini")!r}, device="cpu")
given = {given!r}
if "loss" in given:
    given["teacher"] = lab.load_model("tiny-llama", device="cpu")[0]
lab.recover(model, tokenizer, lab.load_domain("tiny-law"), out_dir={str(out)!r}, **given)
"""
    killed = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL)
    deadline = time.time() + 1800
    while not (out / "checkpoint-8" / "trainer_state.json").is_file():
        assert killed.poll() is None and time.time() < deadline
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    if "loss" in given:
        given["teacher"] = tiny[0]
    resumed, whole = (
        lab.recover(copy.deepcopy(pruned), tiny[1], tiny_domain, out_dir=folder, **given)
        for folder in (out, None)
    )
    assert_same_curve(resumed, whole, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "damage"),
    [
        ("lora", "state missing"),
        ("lora", "weights cut"),
        ("full", "optimizer cut"),
        ("full", "weights flipped"),
        ("lora", "state emptied"),
    ],
)
@pytest.mark.usefixtures("interrupted")
def test_a_broken_checkpoint_is_passed_over(
    tmp_path, whole, mini, pruned, tiny, tiny_domain, method, damage
):
    arguments, out = {"method": method, **PLAIN}, tmp_path / "run"
    lab.recover(mini, tiny[1], tiny_domain, out_dir=out, **arguments)
    last = out / "checkpoint-8"
    weights = f"{'adapter_' if method == 'lora' else ''}model.safetensors"
    part, how = damage.split()
    broken = last / {"state": "trainer_state.json", "weights": weights}.get(part, "optimizer.pt")
    if how == "missing":
        broken.unlink()
    elif how == "emptied":
        broken.write_text("{}")
    elif how == "flipped":
        content = bytearray(broken.read_bytes())
        content[-2] ^= 1
        broken.write_bytes(content)
    else:
        broken.write_bytes(broken.read_bytes()[: broken.stat().st_size // 2])
    again = copy.deepcopy(pruned)
    resumed = lab.recover(again, tiny[1], tiny_domain, out_dir=out, **arguments)
    expected, history = whole[method]
    assert_same_curve(resumed, history)
    assert resumed["seconds"].is_monotonic_increasing and len(resumed) == 5
    assert same_weights(again, expected)


@pytest.mark.slow
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_gradients_that_a_caller_has_switched_off_are_taken(
    whole, mini, tiny, tiny_domain, method, mode
):
    expected, history = whole[method]
    with mode():
        found = lab.recover(mini, tiny[1], tiny_domain, method=method, **PLAIN)
    assert found["perplexity"].tolist() == history["perplexity"].tolist()
    assert same_weights(mini, expected)


@pytest.mark.parametrize(
    ("method", "rate", "stopped"), [("full", 3e-2, "patience"), ("lora", 5e-3, "finished")]
)
def test_a_finished_run_returns_what_it_returned(
    tmp_path, pruned, tiny, tiny_domain, monkeypatch, method, rate, stopped
):
    mini, again = copy.deepcopy(pruned), copy.deepcopy(pruned)
    arguments = {"method": method, "learning_rate": rate, "patience": 1, "out_dir": tmp_path}
    arguments |= SMALL
    history = lab.recover(mini, tiny[1], tiny_domain, epochs=2, **arguments)
    assert history.attrs["stopped"] == stopped
    assert not list(tmp_path.rglob("optimizer.pt")) and list(tmp_path.rglob("trainer_state.json"))
    monkeypatch.setattr(training.RecoveryTrainer, "train", None)
    found = lab.recover(again, tiny[1], tiny_domain, epochs=2, **arguments)
    pd.testing.assert_frame_equal(found, history)
    assert found.attrs == history.attrs and same_weights(again, mini)


def test_another_run_in_the_same_folder_is_refused(tmp_path, pruned, tiny, tiny_domain):
    same = {"out_dir": tmp_path, "learning_rate": 1e-3, **SMALL}
    lab.recover(copy.deepcopy(pruned), tiny[1], tiny_domain, **same)
    for change, words in (
        ({"learning_rate": 2e-3}, r"another learning_rate \(0.001, now 0.002\); repeat that call"),
        ({"method": "lora"}, "another method"),
        ({"max_tokens": 2048}, "another max_tokens .*training text"),
        ({"domain": lab.load_domain("tiny-games")}, "another training text .*validation text"),
        ({"model": copy.deepcopy(tiny[0])}, "another model"),
    ):
        arguments = {"model": copy.deepcopy(pruned), "domain": tiny_domain, **same, **change}
        with pytest.raises(ValueError, match=words):
            lab.recover(tokenizer=tiny[1], **arguments)
    (tmp_path / "run.json").unlink()
    with pytest.raises(ValueError, match="checkpoints of something else"):
        lab.recover(copy.deepcopy(pruned), tiny[1], tiny_domain, **same)


@pytest.mark.parametrize("short", ["model", "teacher"])
def test_models_read_in_another_type_are_another_run(
    tmp_path, pruned, tiny, tiny_domain, monkeypatch, short
):
    """Weights stored in bfloat16 are read so by "auto", also where products are in float32."""
    monkeypatch.delenv(precision.PRECISION_VARIABLE, raising=False)
    monkeypatch.setattr(precision, "has_fast_bfloat16", lambda _: False)
    models = {"model": copy.deepcopy(pruned), "teacher": copy.deepcopy(tiny[0])}
    models[short].to(torch.bfloat16)
    same = {**PLAIN, "max_tokens": 512, "loss": "kl", "out_dir": tmp_path}
    kinds = {"teacher": models["teacher"], "tokenizer": tiny[1], "domain": tiny_domain}
    lab.recover(copy.deepcopy(models["model"]), **kinds, **same)
    with pytest.raises(ValueError, match=rf"the {short} is read in \(bfloat16, now float32\)"):
        lab.recover(models["model"], **kinds, **same, precision="float32")


@pytest.mark.slow
def test_a_full_disk_stops_clearly_and_is_resumed(tmp_path, whole, pruned, tiny, tiny_domain):
    lab.save_model(pruned, tiny[1], tmp_path / "mini")
    script = tmp_path / "run.py"
    script.write_text(f"""
import resource, signal, sys, warnings
import minigpt_lab as lab
from minigpt_lab.recovery import training
real, calls = training.perplexity, []
def full(*arguments, **options):
    calls.append(1)
    if len(calls) == 4:  # before the third checkpoint
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, resource.RLIM_INFINITY))
    return real(*arguments, **options)
training.perplexity = full
model, tokenizer = lab.load_model({str(tmp_path / "mini")!r}, device="cpu")
domain = lab.load_domain("tiny-law")
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    history = lab.recover(model, tokenizer, domain, learning_rate=1e-3,
                          out_dir=sys.argv[1], **{SMALL!r})
assert history.attrs["stopped"] == "disk" and len(history) == 4, history
assert any("checkpoint-12 could not be written" in str(w.message) for w in caught)
text = lab.excerpt(domain.validation, max_characters={SMALL["eval_characters"]})
now = real(model, tokenizer, text, seq_len=64, progress=False).value
assert abs(now / history["perplexity"].min() - 1) < 1e-4, (now, history)
""")
    out = tmp_path / "checkpoints"
    command = [sys.executable, str(script), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    left = sorted(path.name for path in out.iterdir())
    assert left == ["checkpoint-4", "checkpoint-8", "run.json"]
    again, _ = lab.load_model(tmp_path / "mini", device="cpu")
    resumed = lab.recover(again, tiny[1], tiny_domain, out_dir=out, **PLAIN)
    assert_same_curve(resumed, whole["full"][1], rtol=1e-4)


@pytest.mark.slow
def test_two_processes_train_one_model(tmp_path, pruned, tiny):
    lab.save_model(pruned, tiny[1], tmp_path / "mini")
    script = tmp_path / "run.py"
    script.write_text(f"""
import os, sys, torch
import minigpt_lab as lab
rank, domain = os.environ["RANK"], lab.load_domain("tiny-law")
distil = {{"teacher": lab.load_model("tiny-llama", device="cpu")[0], "loss": "mix"}}
for method, rate, options in (("full", 1e-3, distil), ("lora", 5e-3, {{}})):
    model, tokenizer = lab.load_model({str(tmp_path / "mini")!r}, device="cpu")
    zero = {{name: p == 0 for name, p in model.named_parameters()}}
    history = lab.recover(model, tokenizer, domain, method=method, learning_rate=rate, patience=2,
                          **options, out_dir=f"{{sys.argv[1]}}/{{method}}", **{SMALL!r})
    assert all((model.get_parameter(name)[mask] == 0).all() for name, mask in zero.items())
    torch.save((history, history.attrs, model.state_dict()), f"{{sys.argv[1]}}/{{method}}-{{rank}}")
try:
    lab.recover(model, tokenizer, domain)
except ValueError as error:
    assert "2 processes train together" in str(error)
else:
    raise AssertionError
""")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(
        [sys.executable, *command, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for method in ("full", "lora"):
        (one, facts, weights), (other, same, others) = (
            torch.load(tmp_path / f"{method}-{rank}", weights_only=False) for rank in (0, 1)
        )
        pd.testing.assert_frame_equal(one, other)
        assert facts == same and facts["stopped"] == "finished"
        assert all(torch.equal(value, others[name]) for name, value in weights.items())
        assert one["tokens"].tolist() == [0, 1024, 2048, 3072, 4096]
        assert one["step"].tolist() == [0, 2, 4, 6, 8]  # 4 windows of 64 tokens on each of two
        assert one["perplexity"].min() < 0.97 * one["perplexity"][0]


def test_tokens_are_those_that_were_read(mini, tiny, tiny_domain):
    """The last update of an epoch may be smaller."""
    small = {**SMALL, "max_tokens": 64 * 9, "eval_every": 64 * 4, "patience": 9}
    history = lab.recover(mini, tiny[1], tiny_domain, epochs=2, **small)
    assert history["step"].tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert history["tokens"].tolist() == [64 * n for n in (0, 4, 8, 9, 13, 17, 18)]
    accumulated = lab.recover(mini, tiny[1], tiny_domain, gradient_accumulation_steps=2, **small)
    assert accumulated["tokens"].tolist() == [0, 64 * 8, 64 * 9]
    assert accumulated["train_loss"].iloc[1:].notna().all()


@pytest.mark.parametrize("options", [{}, {"loss": "kl"}, {"loss": "kl", "teacher_samples": 4}])
def test_two_devices_of_one_process_are_one_run(mini, tiny, tiny_domain, monkeypatch, options):
    """The Trainer gives each device a batch; on the CPU, one reads both."""
    options = {**PLAIN, **options, "teacher": tiny[0] if options else None}
    whole = lab.recover(copy.deepcopy(mini), tiny[1], tiny_domain, batch_size=8, **options)
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda _: 2))
    parallel = lab.recover(mini, tiny[1], tiny_domain, **options)
    assert parallel["step"].tolist() == [0, 2, 4, 6, 8]
    assert parallel["tokens"].tolist() == [0, 1024, 2048, 3072, 4096]
    if "loss" in options:  # that of labels is computed by each device
        columns = ["train_loss", "perplexity"]
        pd.testing.assert_frame_equal(parallel[columns], whole[columns], rtol=1e-4)


def test_adapters_on_a_trimmed_model_leave_its_tokens_alone(tiny, tiny_domain, recwarn):
    model, tokenizer = tiny
    batches = lab.tokenize(tiny_domain.calibration, tokenizer, seq_len=64, max_tokens=512)
    statistics = lab.collect_statistics(model, batches, progress=False)
    mini = lab.shrink(model, lab.contextual_plan(model, statistics, epsilon_embedding=0.0))
    before = mini.get_input_embeddings().weight.detach().clone()
    recwarn.clear()
    history = lab.recover(mini, tokenizer, tiny_domain, method="lora", learning_rate=5e-3, **SMALL)
    assert history["perplexity"].min() < 0.9 * history["perplexity"][0]
    assert torch.equal(mini.get_input_embeddings().weight, before)
    assert not [w for w in recwarn if "peft" in w.filename]


@pytest.mark.parametrize("name", ["tiny-gpt2", "tiny-bloom"])
def test_fused_and_transposed_layers_recover_with_adapters(name, tiny_domain, recwarn):
    model, tokenizer = lab.load_model(name, device="cpu")
    channels = list(range(64, 512))
    keep = {
        "ffn": [channels, channels, [], channels],
        "attention": [[0, 1, 3], [], [2], [0, 1, 2, 3]],
    }
    units = {"ffn": [512] * 4, "attention": [4] * 4}
    first = adapters.adapter_targets(model, None)[0]
    plan = lab.PruningPlan("", units, keep, {first: {"input": [3, 5], "output": [7]}})
    mini = lab.shrink(model, plan)
    zero = mini.get_submodule(first).weight == 0
    recwarn.clear()
    history = lab.recover(mini, tokenizer, tiny_domain, method="lora", learning_rate=5e-3, **SMALL)
    assert history["perplexity"].min() < 0.97 * history["perplexity"][0]
    assert zero.sum() > 500 and (mini.get_submodule(first).weight[zero] == 0).all()
    assert not [w for w in recwarn if "peft" in w.filename]


def test_checkpoints_have_the_names_in_memory(tmp_path):
    """GPT-NeoX is published with another name for its head than transformers gives it."""
    model = random_model("gpt_neox")
    with adapters.trainable(model) as training:
        training.module.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) == set(model.state_dict())
    assert "save_pretrained" not in vars(model)


def test_adapters_go_where_they_are_asked_to(mini, tiny, tiny_domain):
    before = copy.deepcopy(mini)
    wanted = ["q_proj", "model.layers.1.mlp.up_proj"]
    lab.recover(
        mini,
        tiny[1],
        tiny_domain,
        method="lora",
        learning_rate=5e-3,
        target_modules=wanted,
        **SMALL,
    )
    changed = {
        name.removesuffix(".weight")
        for name, value in before.named_parameters()
        if not torch.equal(value, mini.get_parameter(name))
    }
    layers = range(len(mini.model.layers))
    assert changed == {f"model.layers.{n}.self_attn.q_proj" for n in layers} | {wanted[1]}
    for targets, words in (
        (["q_prj"], "no linear layer 'q_prj' to adapt; did you mean 'q_proj'"),
        (["model.layers.99.mlp.up_proj"], "did you mean 'model.layers"),
        ([], r"target_modules is \[\]; expected a list"),
    ):
        with pytest.raises(ValueError, match=words):
            lab.recover(mini, tiny[1], tiny_domain, method="lora", target_modules=targets)
    assert len(adapters.adapter_targets(mini, None)) == 7 * len(layers)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_model_is_left_as_it_was_but_for_its_weights(
    whole, mini, tiny, tiny_domain, method, capfd
):
    mini.config.use_cache, plain = True, whole[method][1]
    capfd.readouterr()
    saving = lab.recover(
        mini, tiny[1], tiny_domain, method=method, gradient_checkpointing=True, **PLAIN
    )
    assert capfd.readouterr() == ("", "")
    assert saving["perplexity"].tolist() == pytest.approx(plain["perplexity"].tolist(), rel=1e-3)
    assert mini.config.use_cache and not mini.is_activation_checkpointing


def test_a_loss_that_is_not_a_number_ends_it(mini, tiny, tiny_domain):
    before = copy.deepcopy(mini)
    with pytest.warns(UserWarning, match="not finite; .* try a lower learning_rate$"):
        history = lab.recover(mini, tiny[1], tiny_domain, learning_rate=1e30, **SMALL)
    assert history.attrs == {"stopped": "diverged", "best_step": 0} and len(history) == 1
    assert same_weights(mini, before)
    with torch.no_grad():
        mini.model.norm.weight[0] = float("nan")
    with pytest.raises(ValueError, match="gives NaN on tiny-law/validation"):
        lab.recover(mini, tiny[1], tiny_domain, **SMALL)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_weights_of_a_short_type_are_trained_as_well(pruned, tiny, tiny_domain, method, stored):
    """Steps that a stored weight would not feel add up."""
    options = {**SMALL, "max_tokens": 1024, "eval_every": 512, "learning_rate": 1e-3}
    whole = copy.deepcopy(pruned)
    expected = lab.recover(whole, tiny[1], tiny_domain, method=method, **options)
    short = copy.deepcopy(pruned).to(stored)
    before = zeros(short)
    short.requires_grad_(False)  # as a merged adapter's weights are
    found = lab.recover(short, tiny[1], tiny_domain, method=method, **options)
    assert {p.dtype for p in short.parameters()} == {stored}
    assert not any(p.requires_grad for p in short.parameters())
    gain, same = (h["perplexity"][0] - h["perplexity"].min() for h in (expected, found))
    # rounding the weights moves a perplexity near 90 by 0.1 or so; trained in their own type they
    # gain a quarter
    assert gain > 0.5 and same > gain / 2
    assert reached(short, tiny, tiny_domain) == pytest.approx(found["perplexity"].min(), rel=1e-4)
    for name, zero in before.items():
        if zero.dim() == 2:
            assert (short.get_parameter(name)[zero] == 0).all(), name


def test_numbers_of_numpy_are_numbers_and_the_seeds_are_put_back(mini, tiny, tiny_domain, tmp_path):
    options = {
        "max_tokens": np.int64(1024), "epochs": torch.tensor(1.0), "seq_len": np.int32(64),
        "learning_rate": np.float32(1e-3), "eval_every": np.float64(512),
        "eval_characters": np.int64(900), "seed": np.uint8(3), "stop_at": np.float64(1.5),
        "warmup_ratio": np.float32(0.1), "gradient_checkpointing": np.bool_(True),
        "out_dir": tmp_path / "run",
    }  # fmt: skip
    torch.manual_seed(11)
    random.seed(11)
    np.random.seed(11)  # noqa: NPY002
    state, environment = generators(), dict(os.environ)
    whole = lab.recover(copy.deepcopy(mini), tiny[1], tiny_domain, **options)
    again = lab.recover(mini, tiny[1], tiny_domain, **options)  # what the folder holds
    assert state == generators() and environment == dict(os.environ)
    pd.testing.assert_frame_equal(whole, again)
    with pytest.raises(FileNotFoundError), runtime.seeded(7):
        torch.rand(1), random.random(), np.random.rand()  # noqa: NPY002
        raise FileNotFoundError
    assert state == generators()


def generators() -> tuple:
    numpy = np.random.get_state()  # noqa: NPY002
    return torch.get_rng_state().tolist(), random.getstate(), numpy[1].tolist(), numpy[2]


def test_a_perplexity_that_means_nothing_is_called_diverged(mini, tiny, tiny_domain, monkeypatch):
    before, found = copy.deepcopy(mini), iter([20.0, 15.0, 1e137])
    monkeypatch.setattr(
        training, "perplexity", lambda *_, **__: types.SimpleNamespace(value=next(found), tokens=9)
    )
    line = (
        "stopped: the perplexity has diverged; .* try a lower learning_rate, or precision='float32'"
    )
    with pytest.warns(UserWarning, match=line):
        history = lab.recover(mini, tiny[1], tiny_domain, **PLAIN, precision="bfloat16")
    assert history.attrs == {"stopped": "diverged", "best_step": 4}
    assert history["perplexity"].tolist() == [20.0, 15.0, 1e137]
    assert not same_weights(mini, before)  # the best state


@pytest.mark.parametrize(
    ("values", "stopped", "steps"),
    [
        ([20.0, 25.0, 24.0, 23.0], "patience", 8),  # better than the one before, not than the start
        ([20.0, 15.0, 16.0, 15.0], "patience", 12),
        ([20.0, 25.0, 19.0, 19.5, 18.0], "finished", 16),
    ],
)
def test_patience_compares_with_the_start(
    mini, tiny, tiny_domain, monkeypatch, values, stopped, steps
):
    found = iter(values)
    monkeypatch.setattr(
        training, "perplexity", lambda *_, **__: types.SimpleNamespace(value=next(found), tokens=9)
    )
    history = lab.recover(mini, tiny[1], tiny_domain, patience=2, **PLAIN)
    assert history.attrs["stopped"] == stopped and history["step"].iloc[-1] == steps


POSITIVE = (
    "max_tokens", "stop_at", "eval_every", "eval_characters", "patience", "batch_size",
    "gradient_accumulation_steps", "r", "lora_alpha",
)  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"method": "prayer"}, "method is 'prayer'; expected one of 'full', 'lora'"),
        ({"epochs": 0}, "epochs is 0"),
        ({"learning_rate": -1e-4}, "learning_rate is -0.0001"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"seq_len": 100_000}, "less than one window"),
        (
            {"max_tokens": 100},
            "max_tokens is 100, less than one window of seq_len=256; give 256 or",
        ),
        ({"target_modules": ["q_proj"]}, "target_modules is .* no effect with method='full'"),
        ({"warmup_steps": 5, "warmup_ratio": 0.2}, "warmup_ratio is 0.2, .* with warmup_steps"),
        ({"r": 4}, "r is 4, but has no effect with method='full'; leave it out"),
        ({"mix": 0.2}, "mix is 0.2, but has no effect with loss='label'"),
        ({"temperature": 2}, "temperature is 2, but has no effect with loss='label'"),
        ({"generality": 0.5}, "generality is 0.5, but has no effect with general=None"),
        ({"lora_dropout": 1.0}, "lora_dropout is 1.0"),
        *(({name: 0}, f"{name} is 0; expected a (whole )?number") for name in POSITIVE),
    ],
)
def test_bad_arguments_are_named(mini, tiny, tiny_domain, arguments, words):
    with pytest.raises(ValueError, match=words):
        lab.recover(mini, tiny[1], tiny_domain, **arguments)


def test_a_whole_domain_is_needed(mini, tiny, tiny_domain):
    line = r"domain is Part\(tiny-law/train, .*; expected a Domain; pass all of it, e.g"
    with pytest.raises(TypeError, match=line):
        lab.recover(mini, tiny[1], tiny_domain.train)
    with pytest.raises(TypeError, match="domain is None; expected"):
        lab.recover(mini, tiny[1], None)
    with pytest.raises(TypeError, match="other is 'tiny-games'; expected a Domain"):
        lab.recover(mini, tiny[1], tiny_domain, other="tiny-games")


def test_parts_that_are_too_short_are_named(mini, tiny, tiny_domain):
    for part, words in (
        ({"train": ("A word.",)}, "tiny-law/train has .* less than one window"),
        ({"validation": ()}, "tiny-law/validation is empty"),
    ):
        short = dataclasses.replace(
            tiny_domain, **{k: lab.Part("tiny-law", k, v) for k, v in part.items()}
        )
        with pytest.raises(ValueError, match=words):
            lab.recover(mini, tiny[1], short)
