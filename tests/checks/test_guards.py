"""What a call changes is put back whatever happens; one model is used by one call at a time."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from minigpt_lab.checks import locked, model_locks, restore_on_exit, safe_contextmanager


def test_a_second_thread_waits_for_the_model_and_the_same_one_does_not():
    model, log = torch.nn.Linear(1, 1), []

    def other():
        with locked(model):
            log.append("second")

    with locked(model), locked(model, model):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join(0.2)
        log.append("first")
    thread.join()
    assert log == ["first", "second"]


def test_two_calls_with_the_same_two_models_in_either_order_both_end():
    first, second, done = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1), []

    def use(*models):
        for _ in range(200):
            with locked(*models):
                pass
        done.append(models)

    threads = [
        threading.Thread(target=use, args=pair) for pair in ((first, second), (second, first))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(done) == 2


@pytest.mark.parametrize("place", ["enter", "body", "leave"])
def test_an_interrupt_is_raised_once_and_nothing_stays_changed(place):
    state = []

    @safe_contextmanager
    def changed():
        state.append("half")
        if place == "enter":
            os.kill(os.getpid(), signal.SIGINT)
        state.append("whole")
        try:
            yield
        finally:
            if place == "leave":
                os.kill(os.getpid(), signal.SIGINT)
            state.clear()

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), changed():
        if place == "body":
            os.kill(os.getpid(), signal.SIGINT)
        assert place == "leave"
    assert state == [] and signal.getsignal(signal.SIGINT) is before


HAMMERED = """
import contextlib, os, random, signal, sys, threading, time
from minigpt_lab.checks import safe_contextmanager
state = [0, 0]

@safe_contextmanager
def changed():
    state[0] = state[1] = 1
    try:
        yield
    finally:
        state[0] = 0
        state[1] = 0

def hammer():
    for _ in range(int(sys.argv[1])):
        time.sleep(random.random() * 2e-3)
        os.kill(os.getpid(), signal.SIGINT)

interrupts = threading.Thread(target=hammer, daemon=True)
caught = entered = 0
interrupts.start()
while interrupts.is_alive():
    try:
        with changed(), changed():
            entered += 1
        assert state == [0, 0], state
    except KeyboardInterrupt:
        caught += 1
        assert state == [0, 0], state
print(caught, entered)
"""


@pytest.mark.slow
def test_no_signal_at_any_moment_leaves_a_change_behind():
    done = subprocess.run([sys.executable, "-c", HAMMERED, "300"], capture_output=True, text=True)
    # the interrupt may also come between two rounds, where nothing is held and the script ends
    if "assert" not in done.stderr and done.returncode:
        assert "KeyboardInterrupt" in done.stderr, done.stderr
    assert "AssertionError" not in done.stderr, done.stderr


def test_ctrl_c_ends_a_wait():
    model, held, done = torch.nn.Linear(1, 1), threading.Event(), threading.Event()

    def other():
        with locked(model):
            held.set()
            done.wait(120)

    def interrupt():
        while not model_locks._waiting:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    holder, sender = threading.Thread(target=other), threading.Thread(target=interrupt)
    holder.start()
    held.wait(60)
    sender.start()
    try:
        with pytest.raises(KeyboardInterrupt), locked(model):
            raise AssertionError
    finally:
        done.set()
        holder.join(60)
        sender.join(60)
    with locked(model):
        pass
    assert signal.getsignal(signal.SIGINT) is before and not model_locks._waiting


def test_hooks_and_parts_come_back():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU())
    keys, weight = [sorted(vars(m)) for m in model.modules()], model[0].weight
    with pytest.raises(KeyError), restore_on_exit(model):
        model[0].weight = torch.nn.Parameter(torch.zeros(2, 2), requires_grad=False)
        model[1] = torch.nn.Identity()
        model.extra = torch.nn.Linear(1, 1)
        model[0].forward = lambda x: x
        model[0].register_forward_hook(lambda *_: None)
        model[0].bias.requires_grad_(False).grad = torch.ones(2)
        raise KeyError
    assert model[0].weight is weight and type(model[1]) is torch.nn.ReLU
    assert [sorted(vars(m)) for m in model.modules()] == keys
    assert not model[0]._forward_hooks and model[0].bias.requires_grad
    assert model[0].bias.grad is None
