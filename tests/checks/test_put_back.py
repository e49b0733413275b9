"""A call leaves the model as it found it, wherever it is interrupted; threads take turns."""

from __future__ import annotations

import contextlib
import copy
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from helpers import SHORT, picture, random_model, random_plan
from torch.nn.modules.module import register_module_forward_pre_hook

import minigpt_lab as lab
from minigpt_lab.calibration.gradients import collect_gradients
from minigpt_lab.calibration.spsa import estimate_gradients
from minigpt_lab.checks import locked
from minigpt_lab.models.anatomy import Anatomy
from minigpt_lab.models.runtime import fingerprint
from minigpt_lab.recovery.adapters import trainable
from minigpt_lab.widgets.jobs import ModelJob


def linears(model) -> list[str]:
    return [name for _, name, _ in Anatomy(model).linears()]


def masked_loss(model, batches):
    with lab.masked(model, random_plan(model, 3)), torch.no_grad():
        return model(input_ids=batches[0]["input_ids"]).logits


CHECKPOINTED = {"squares": True, "gradient_checkpointing": True}
CALLS = {
    "statistics": lambda m, b: lab.collect_statistics(m, b, progress=False).sums,
    "influence": lambda m, b: lab.block_influence(m, b)["influence"].to_numpy(),
    "gradients": lambda m, b: collect_gradients(m, b, linears(m)).mean,
    "checkpointed": lambda m, b: (
        collect_gradients(m, b, linears(m), squares=True, gradient_checkpointing=True).square
    ),
    "spsa": lambda m, b: estimate_gradients(m, b, linears(m), n_directions=3).coefficients,
    "masked": masked_loss,
    "shrink": lambda m, b: dict(lab.shrink(m, random_plan(m, 4)).named_parameters()),
}
ALONE = {
    "wanda": lambda m, b: lab.score(m, "wanda", b, sequential=0.3),
    "hessians": lambda m, b: lab.collect_hessians(m, b, linears(m)[:3], progress=False),
    "slimgpt": lambda m, b: lab.slimgpt(m, b, ratio=0.3, progress=False),
    "search": lambda m, b: lab.search_counts(m, b, ratio=0.3, rounds=1, steps=2, progress=False),
}


def batches() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [{"input_ids": torch.randint(3, 97, (2, 24), generator=generator)} for _ in range(3)]


def prepared() -> torch.nn.Module:
    """A model in an unusual state: training, in part frozen, with a gradient and a hook."""
    model = random_model("llama").train()
    model.model.layers[1].eval()
    parameters = list(model.parameters())
    parameters[2].requires_grad_(False)
    parameters[4].grad = torch.ones_like(parameters[4])
    model.lm_head.register_forward_hook(lambda *_: None)
    return model


@contextlib.contextmanager
def interrupted_at(call: int):
    """Ctrl-C as the so-manieth module begins to compute."""
    seen = 0

    def count(*_):
        nonlocal seen
        seen += 1
        if seen == call:
            raise KeyboardInterrupt

    handle = register_module_forward_pre_hook(count)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("name", [*CALLS, *ALONE])
def test_an_interrupted_call_leaves_nothing_behind(name):
    model, call = prepared(), {**CALLS, **ALONE}[name]
    before, ended = picture(model), []
    for place in (1, 2, 9, 30, 77, 160, 333, 10**9):
        with contextlib.suppress(KeyboardInterrupt), interrupted_at(place):
            call(model, batches())
            ended.append(place)
        assert picture(model) == before, place
    assert ended and (len(ended) < 8 or name == "shrink")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "lora"])
def test_an_interrupted_recovery_leaves_nothing_but_weights_behind(method, tiny, tiny_domain):
    model = copy.deepcopy(tiny[0]).train()
    list(model.parameters())[2].requires_grad_(False)
    list(model.parameters())[4].grad = torch.ones_like(list(model.parameters())[4])
    before, shape, stopped = picture(model), picture(model, weights=False), []
    for place in (1, 40, 250, 700, 1100):
        with contextlib.suppress(KeyboardInterrupt), interrupted_at(place):
            history = lab.recover(
                model,
                tiny[1],
                tiny_domain,
                method=method,
                gradient_checkpointing=True,
                progress=False,
                **SHORT,
            )
            stopped.append(history.attrs["stopped"])
        if not stopped:
            assert picture(model) == before, place
        assert picture(model, weights=False) == shape, place
    assert stopped


HAMMERED = """
import os, random, signal, sys, threading, time
sys.path.insert(0, {tests!r})
import torch
from helpers import random_model
from helpers import picture
from helpers import random_plan
import minigpt_lab as lab
model = random_model("llama")
plans = [random_plan(model, seed) for seed in (1, 2)]
before = picture(model)
ready, left = threading.Event(), threading.Event()

def interrupt(*_):
    if ready.is_set():
        ready.clear()
        raise KeyboardInterrupt

def hammer():
    while not left.is_set():
        time.sleep(random.random() * 2 * long)
        os.kill(os.getpid(), signal.SIGINT)

began = time.perf_counter()
with lab.masked(model, plans[0]), lab.masked(model, plans[1]):
    pass
long = time.perf_counter() - began
signal.signal(signal.SIGINT, interrupt)
threading.Thread(target=hammer, daemon=True).start()
caught = rounds = 0
while caught < 200:
    try:
        ready.set()
        while True:
            with lab.masked(model, plans[0]), lab.masked(model, plans[1]):
                rounds += 1
    except KeyboardInterrupt:
        ready.clear()
        caught += 1
        assert picture(model) == before, (caught, rounds)
left.set()
print("same", rounds)
"""


def hammered(script: str) -> str:
    """What a script prints; it may end by an interrupt that comes as it handles another one."""
    code = script.replace("{tests!r}", repr(str(Path(__file__).parents[1])))
    for _ in range(4):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert "AssertionError" not in done.stderr, done.stderr
        if done.returncode == 0:
            break
    return done.stdout


@pytest.mark.slow
def test_no_signal_at_any_moment_leaves_a_mask_on():
    assert hammered(HAMMERED).startswith("same")


RECOVERY = """
import hashlib, random, signal, sys, threading, time, os, copy, warnings
sys.path.insert(0, {tests!r})
warnings.simplefilter("ignore")
import torch
from helpers import SHORT, picture
import minigpt_lab as lab
model, tokenizer = lab.load_model("tiny-llama", device="cpu")
domain, ready = lab.load_domain("tiny-law"), threading.Event()
options = dict(SHORT, max_tokens=256, eval_every=128, progress=False)

def interrupt(*_):
    if ready.is_set():
        ready.clear()
        raise KeyboardInterrupt

def hammer(seconds):
    time.sleep(seconds)
    os.kill(os.getpid(), signal.SIGINT)

def weights(model):
    return [hashlib.sha256(each.detach().numpy()).digest() for each in model.parameters()]

signal.signal(signal.SIGINT, interrupt)
old = weights(model)
for method in ("lora", "full"):
    finished, began = copy.deepcopy(model), time.perf_counter()
    lab.recover(finished, tokenizer, domain, method=method, **options)
    long, new = time.perf_counter() - began, weights(finished)
    for place in range(8):
        subject = copy.deepcopy(model)
        shape = picture(subject, weights=False)
        when = long * (random.random() if place % 2 else 0.9 + 0.2 * random.random())
        thread = threading.Thread(target=hammer, args=(when,))
        raised = False
        try:
            ready.set()
            thread.start()
            lab.recover(subject, tokenizer, domain, method=method, **options)
        except KeyboardInterrupt:
            raised = True
        ready.clear()
        thread.join()
        assert picture(subject, weights=False) == shape
        assert not raised or weights(subject) in (old, new)
print("same")
"""


@pytest.mark.slow
def test_a_signal_leaves_no_model_wrapped_and_no_half_of_a_recovery():
    assert hammered(RECOVERY).startswith("same")


def test_masks_left_out_of_order_are_an_error_and_all_come_off():
    model = random_model("gemma2")
    before = picture(model)
    for order in ((0, 1), (0, 2, 1), (1, 0, 2), (0, 1, 2)):
        masks = [lab.masked(model, random_plan(model, seed)) for seed in range(len(order))]
        for mask in masks:
            mask.__enter__()
        assert picture(model) != before
        with pytest.raises(RuntimeError, match="in the reverse of the order"):
            for place in order:
                masks[place].__exit__(None, None, None)
        for mask in masks:
            with contextlib.suppress(RuntimeError):
                mask.__exit__(None, None, None)
        assert picture(model) == before
        other = threading.Thread(target=lab.shrink, args=(model, random_plan(model, 1)))
        other.start()
        other.join(60)
        assert not other.is_alive()  # nobody holds it any more


def test_a_mask_in_a_generator_or_another_thread_comes_off():
    model = random_model("llama")
    before = picture(model)

    def layers():
        with lab.masked(model, random_plan(model, 1)):
            yield from range(3)

    steps = layers()
    next(steps)
    assert picture(model) != before
    del steps
    assert picture(model) == before
    stack = contextlib.ExitStack()
    stack.enter_context(lab.masked(model, random_plan(model, 2)))
    leaving = threading.Thread(target=stack.close)
    leaving.start()
    leaving.join(60)
    assert picture(model) == before
    with locked(model):
        pass


def test_a_mask_keeps_ties_and_follows_the_model(probe):
    model = random_model("llama")  # tied
    plan = random_plan(model, 5)
    dense, before = model(input_ids=probe).logits, picture(model)
    with torch.inference_mode(), lab.masked(model, plan):
        assert model.lm_head.weight is model.model.embed_tokens.weight
        zeroed = model.lm_head.weight == 0
        assert zeroed.any() and torch.equal(zeroed, model.model.embed_tokens.weight == 0)
    assert picture(model) == before
    with lab.masked(model, plan):
        model.double()
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    torch.testing.assert_close(model(input_ids=probe).logits, dense.double(), rtol=1e-3, atol=1e-3)


def test_threads_take_turns():
    """All calls at once, on one model, give what each gives alone."""
    model, text = prepared(), batches()
    before = picture(model)
    alone = {name: call(model, text) for name, call in CALLS.items()}
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for turn in range(3):
            found, start = {}, threading.Barrier(len(CALLS))

            def run(name, found=found, start=start):
                start.wait(60)
                found[name] = CALLS[name](model, text)

            threads = [threading.Thread(target=run, args=(name,)) for name in CALLS]
            for thread in threads[turn:] + threads[:turn]:
                thread.start()
            for thread in threads:
                thread.join(300)
            for name, expected in alone.items():
                assert same(found[name], expected), name
            assert picture(model) == before
    finally:
        sys.setswitchinterval(interval)


def test_models_are_built_one_at_a_time():
    """Building one changes torch and transformers for all threads; it comes back, for good."""
    ours = {name: getattr(torch.nn.init, name) for name in dir(torch.nn.init)}
    ours["weights"] = transformers.PreTrainedModel.init_weights
    failed, start = [], threading.Barrier(3)
    models = [random_model("llama") for _ in range(20)]  # by transformers alone: not beside others

    def load(dtype):
        try:
            start.wait(60)
            for _ in range(6):
                model, _ = lab.load_model("tiny-llama", dtype=dtype, device="cpu")
                assert {p.dtype for p in model.parameters()} == {dtype}
                assert {b.dtype for b in model.buffers()} == {torch.float32}
        except BaseException as error:  # noqa: BLE001
            failed.append(error)

    def adapt():
        start.wait(60)
        for model in models:
            with trainable(model, linears(model), r=2) as training:
                factors = [p for n, p in training.module.named_parameters() if "lora_A" in n]
                failed.extend(f for f in factors if f.std() == 0 or not f.isfinite().all())

    threads = [threading.Thread(target=load, args=(t,)) for t in (torch.float32, torch.bfloat16)]
    for thread in (*threads, adapting := threading.Thread(target=adapt)):
        thread.start()
    for thread in (*threads, adapting):
        thread.join()
    now = {name: getattr(torch.nn.init, name) for name in dir(torch.nn.init)}
    assert not failed and ours == {**now, "weights": transformers.PreTrainedModel.init_weights}
    assert torch.get_default_dtype() is torch.float32


@pytest.mark.parametrize("name", ["full", "lora", "slimgpt"])
def test_a_model_is_not_changed_for_good_under_a_mask(name, tiny, tiny_domain):
    model = copy.deepcopy(tiny[0])
    before = picture(model)
    with (
        lab.masked(model, random_plan(model, 3, vocabulary=False)),
        pytest.raises(ValueError, match=r"under a mask.*shrink"),
    ):
        if name == "slimgpt":
            lab.slimgpt(model, batches(), ratio=0.3, inplace=True, progress=False)
        else:
            lab.recover(model, tiny[1], tiny_domain, method=name, progress=False, **SHORT)
    assert picture(model) == before


MADE = {
    "loaded": lambda m, b: lab.load_model("tiny-llama", device="cpu")[0],
    "shrunk": lambda m, b: lab.shrink(m, random_plan(m, 4)),
    "slimgpt": lambda m, b: lab.slimgpt(m, b, ratio=0.3, progress=False)[0],
    "compensated": lambda m, b: lab.weight_compensated(
        m, plan := random_plan(m, 4, vocabulary=False), read_by(m, plan, b)
    ),
}


def read_by(model, plan, batches) -> lab.Hessians:
    masks = plan.kept_features(Anatomy(model))
    names = [name for name, sides in masks.items() if not sides["input"].all()]
    return lab.collect_hessians(model, batches, names, progress=False)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("name", MADE)
def test_what_is_made_without_gradients_can_be_trained_and_hashed(name, mode):
    model = random_model("llama")
    with mode():
        made = MADE[name](model, batches())
    assert len(fingerprint(made)) == 64
    made(input_ids=torch.zeros(2, 8, dtype=torch.int64)).logits[..., 0].sum().backward()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(parameter.grad)


def same(one, other) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    return np.array_equal(one, other)


def test_a_job_says_that_it_waits_and_can_be_cancelled():
    model = random_model("llama")
    job = ModelJob("measure", lambda _tick: str(lab.block_influence(model, batches()).shape))
    with lab.masked(model, random_plan(model, 1)):
        job.start()
        wait_until(lambda: "LlamaForCausalLM is in use" in job.state.value)
        job.cancel.click()
        wait_until(lambda: "cancelled" in job.state.value)
        job.start()
        with pytest.raises(RuntimeError, match="waits for a model that this cell holds"):
            job.wait()
    job.wait()
    job.start()
    job.wait()
    assert "(3, 3)" in job.result.value and job.state.value == ""


def wait_until(happens) -> None:
    deadline = time.monotonic() + 120
    while not happens():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_job_that_fails_or_is_cancelled_leaves_the_model_as_it_was():
    model = prepared()
    before = picture(model)

    def work(tick):
        with lab.masked(model, random_plan(model, 1, vocabulary=False)):
            handle = model.lm_head.register_forward_hook(lambda *_: tick(0.5))
            try:
                for _ in range(10**6):
                    estimate_gradients(model, batches(), linears(model))
            finally:
                handle.remove()

    job = ModelJob("measure", work)
    job.start()
    wait_until(lambda: job.progress.value == 0.5)
    job.cancel.click()
    job.wait()
    assert "cancelled" in job.state.value and picture(model) == before


def test_waiting_that_would_never_end_is_refused():
    models, both, refused = [random_model("llama"), random_model("opt")], threading.Barrier(2), []

    def use(first, second):
        with locked(first):
            both.wait(60)
            try:
                with locked(second):
                    pass
            except RuntimeError as error:
                refused.append(str(error))

    threads = [threading.Thread(target=use, args=pair) for pair in (models, models[::-1])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert refused and "two threads wait for each other's models" in refused[0]
    mask = lab.masked(models[0], random_plan(models[0], 1))
    ended = threading.Thread(target=mask.__enter__)
    ended.start()
    ended.join(60)
    with pytest.raises(RuntimeError, match="held by a thread that has ended"), locked(models[0]):
        pass
