"""Exercises that ask for a function: run on small inputs, and told what is off about it."""

from __future__ import annotations

import contextlib
import signal
import threading
import time

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import logits, random_model

import minigpt_lab as lab
from minigpt_lab import experiments
from minigpt_lab.evaluation.comparison import _difference
from minigpt_lab.evaluation.windows import resampled
from minigpt_lab.exercises import functions
from minigpt_lab.exercises.checking import EXERCISES
from minigpt_lab.exercises.functions import normal
from minigpt_lab.exercises.verdicts import Answer
from minigpt_lab.models import Anatomy
from minigpt_lab.recovery.distillation import DistillationLoss, Teacher

FUNCTIONS = [name for name, exercise in EXERCISES.items() if exercise.kind == "function"]


def answer(name: str) -> Answer:
    return EXERCISES[name].compute()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_typical_mistake_gets_its_own_sentence(name):
    exercise = answer(name)
    assert lab.check(name, exercise.value).message == f"{name}: right"
    assert len(exercise.mistakes) >= 4
    for mistake, function in exercise.mistakes.items():
        verdict = lab.check(name, function)
        assert verdict.right is False and verdict.message == f"{name}: this is {mistake}"


# The right functions are what the kit computes.


def test_a_shrunk_ffn_is_that_of_a_shrunk_model():
    model = random_model("llama")
    statistics = lab.collect_statistics(model, [{"input_ids": torch.arange(12)[None] + 3}])
    plan = lab.contextual_plan(model, statistics, quantile=0.3)
    before, after = (each.model.layers[1].mlp for each in (model, lab.shrink(model, plan)))
    names = ("gate_proj", "up_proj", "down_proj")
    weights = [getattr(before, name).weight for name in names]
    found = answer("shrunk ffn").value(*weights, plan.keep["ffn"][1])
    for name, weight in zip(names, found, strict=True):
        assert torch.equal(weight, getattr(after, name).weight)


def test_wanda_scores_sum_to_those_of_channels():
    model = random_model("llama")
    batches, seen = [{"input_ids": torch.arange(12)[None] + 3}], []
    down = model.model.layers[0].mlp.down_proj
    handle = down.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0]))
    with torch.no_grad():
        model(**batches[0])
    handle.remove()
    scores = answer("wanda scores").value(down.weight, seen[0]).mean(0)
    expected = lab.score(model, "wanda", batches, sites=("ffn",)).values["ffn"][0]
    assert scores.detach().numpy() == pytest.approx(expected, rel=1e-4)


def test_a_front_is_that_of_runs():
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"stored": rng.integers(5, 9, 30), "perplexity": rng.integers(20, 26, 30)})
    table = table.assign(model="m", protocol="p", text="t").astype({"stored": float})
    found = answer("pareto front").value(*table[["stored", "perplexity"]].to_numpy(float).T)
    assert found.tolist() == experiments.pareto(table).tolist() and 0 < found.sum() < 30


def test_an_interval_is_that_of_compare():
    loss, other, tokens, _ = answer("paired interval").cases["twelve passages"]
    table = np.stack([loss, tokens, other, tokens], 1)
    picks = np.random.default_rng(3).integers(12, size=(300, 12))
    low, high = answer("paired interval").value(loss, other, tokens, picks)
    assert (low, high) == pytest.approx(resampled(table, _difference, 300, 3)[:, 0])


def test_a_distillation_loss_is_that_of_recover():
    models = [random_model("llama", seed) for seed in (0, 1)]
    ids = torch.arange(12)[None] + 3
    student, teacher = (logits(model, ids) for model in models)
    loss = DistillationLoss(Teacher(models[1], models[0], temperature=2.0), mix=1.0)
    expected = float(loss({"logits": student}, ids))
    found = answer("distillation loss").value(student[0, :-1], teacher[0, :-1], 2.0)
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_a_header_is_that_of_an_exported_file(tiny, tmp_path):
    model, tokenizer = tiny
    lab.export_gguf(model, tokenizer, tmp_path / "tiny.gguf", kind="Q8_0")
    version, tensors, fields = answer("gguf header").value((tmp_path / "tiny.gguf").read_bytes())
    layers = len(Anatomy(model).layers)
    assert version == 3 and tensors >= 9 * layers + 2 and 15 < fields < 40


def test_rounded_weights_are_those_of_a_quantised_model(tiny):
    model, _ = tiny
    rounded = lab.quantised(model, "Q8_0").model.layers[0].mlp.down_proj.weight[0]
    w = model.model.layers[0].mlp.down_proj.weight[0].detach().numpy()
    assert rounded.detach().numpy() == pytest.approx(answer("rounded weights").value(w), abs=1e-7)


# What a reader may write.


def verdict(function, right=lambda W, X: W + X, mistakes=(), **cases) -> str:
    """What is said of a function of a matrix and a matrix."""
    cases = cases or {"one": (normal(2, 3), normal(2, 3, seed=1)), "two": (normal(4), normal(4))}
    problem = Answer(right, dict(mistakes), cases=cases).problem("function", function)
    assert problem is None or (problem and "\n" not in problem)
    return problem


def one_more(W, X):
    Y = W + X
    if Y.ndim == 2:
        Y[0, 0] += 1
    return Y


def raises(W, X):
    W = W + 1
    return W @ X.reshape(5)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda W, X: W + X, None),
        (lambda W, X: (W + X).numpy(), None),
        (lambda W, X: 2 * (W + X).bfloat16(), "every value is 2 times the right one"),
        (lambda W, X: [(W + X)[i].tolist() for i in range(len(W))], None),
        (lambda W, X: -W - X, "the right size and the wrong sign"),
        (lambda W, X: 2 * (W + X), "the scale is off: every value is 2 times the right one"),
        (lambda W, X: (W + X) / len(W), "by another factor for each input: 0.5, 0.25"),
        (lambda W, X: (W + X).t(), "returns shape [3, 2]; expected [2, 3]; transpose it"),
        (lambda W, X: (W + X).sum(), "returns shape []; expected [2, 3]"),
        (lambda W, X: (W + X).flatten().flip(0).reshape(W.shape), "in another order"),
        (one_more, "right for two; for one, 1 of 6 values are off; the first, at [0, 0], is too l"),
        (lambda W, X: (W + X) / 0, "6 of 6 values are NaN or infinite"),
        (lambda W, X: print("hello"), "returns None; return the tensor of shape [2, 3]"),
        (lambda W, X: "W + X", "returns a str; expected a tensor of shape [2, 3]"),
        (lambda W, X: (W, X, "a"), "returns a tuple; expected a tensor of shape [2, 3]"),
        (lambda W, X: {"a": W}, "returns a dict; expected a tensor"),
        (lambda W, X: (w for w in W), "returns a generator; expected a tensor"),
        (lambda W: W, "it takes (W); expected the arguments W, X"),
        (lambda W, X: W.add_(X), "it changes its input W; work on W.clone() (input: one)"),
        (raises, "it raises RuntimeError: shape '[5]' is invalid for input of size 6 (its line 3)"),
        (lambda W, X: {}["key"], "it raises KeyError: 'key' (its line 1)"),
        (lambda W, X: exit(), "it raises SystemExit"),
        (lambda W, X: raises.__wrapped__, "it raises AttributeError"),
        (lambda W, X: (lambda f: f(f))(lambda f: f(f)), "it raises RecursionError"),
    ],
)  # fmt: skip
def test_what_is_off_is_named(function, message, capsys):
    problem = verdict(function)
    assert problem is None if message is None else message in problem
    assert len(problem or "") < 250


def test_several_values_and_typical_mistakes():
    cases = {"a": (3.0, 4.0)}
    mistakes = {"the second before the first": lambda a, b: (b, a)}

    def told(function):
        return verdict(function, lambda a, b: (a, b), mistakes, **cases)

    assert told(lambda a, b: [a, b]) is None and told(lambda a, b: np.array([a, b])) is None
    assert told(lambda a, b: (b, a)) == "this is the second before the first"
    assert told(lambda a, b: a) == "it returns a float; expected 2 values"
    assert told(lambda a, b: (a, b, b)) == "it returns 3 values; expected 2"
    assert told(lambda a, b: None) == "it returns None; return the 2 values"


def test_a_choice_of_some_is_off_by_true_and_false():
    cases = {"a": (np.array([1.0, 2, 3]),)}
    problem = verdict(lambda x: x > 0, lambda x: x > 1, **cases)
    assert problem == "1 of 3 values are off; the first, at [0], is True"


def test_a_model_is_left_as_it_was():
    def leaves_a_hook(model, name, batches):
        model.get_submodule(name).register_forward_hook(lambda *_: None)
        return 0

    def changes_weights(model, ids, layer, channel):
        model.model.layers[layer].mlp.down_proj.weight.data[:, channel] = 0
        return model(ids).logits

    def without_no_grad(model, ids, layer, channel):
        model.model.layers[layer].mlp.down_proj.weight[:, channel] = 0
        return model(ids).logits

    def changes_a_batch(model, name, batches):
        batches[0]["input_ids"].zero_()
        return 0

    said = lab.check("mean magnitude", leaves_a_hook).message
    assert "it leaves a hook on model; keep its handle, and call handle.remove()" in said
    said = lab.check("masked logits", changes_weights).message
    assert "it changes the weights of model; put them back at the end, from a clone" in said
    said = lab.check("masked logits", without_no_grad).message
    assert "; change weights within `with torch.no_grad():` (its line 2)" in said
    said = lab.check("mean magnitude", changes_a_batch).message
    assert "it changes its input batches; work on a copy" in said


def test_the_matrix_of_a_wrong_shape_is_named():
    said = lab.check("shrunk ffn", lambda g, u, d, keep: (g[keep], u, d[:, keep])).message
    assert "it returns shape [7, 4] as value 2 of 3; expected [3, 4]" in said


def test_a_stub_and_what_is_no_function():
    def stub(W, X):
        return ...

    unanswered = lab.check("wanda scores", stub)
    assert unanswered.right is None and "not answered yet; expected is a function" in str(
        unanswered
    )
    said = lab.check("wanda scores", normal(2, 3)).message
    assert "a Tensor of shape [2, 3]; expected a function; pass the function itself" in said


def endless(W, X):
    while True:
        with contextlib.suppress(Exception):
            sum(range(1000))


def test_a_loop_that_never_ends_is_ended_and_the_timer_put_back(monkeypatch):
    monkeypatch.setattr(functions, "LIMIT", 0.2)
    rang = []
    handler = signal.signal(signal.SIGALRM, lambda *_: rang.append(True))
    try:
        signal.setitimer(signal.ITIMER_REAL, 900)
        assert "ran for more than 0.2 s on a small input" in verdict(endless)
        left, _ = signal.getitimer(signal.ITIMER_REAL)
        assert 300 < left < 900.1
        signal.setitimer(signal.ITIMER_REAL, 0.01)
        time.sleep(0.05)
        assert rang
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)


@pytest.mark.parametrize("where", ["thread", "no signals"])
def test_there_is_no_limit_where_there_is_no_signal(where, monkeypatch):
    monkeypatch.setattr(functions, "LIMIT", 0.01)

    def slow(W, X):
        time.sleep(0.1)
        return W + X

    found = []
    if where == "thread":
        thread = threading.Thread(target=lambda: found.append(verdict(slow)))
        thread.start()
        thread.join()
    else:
        monkeypatch.delattr(signal, "setitimer")
        found.append(verdict(slow))
    assert found == [None]
