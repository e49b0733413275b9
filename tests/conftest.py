"""Models and texts that tests share."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

# Tiny models gain nothing from a second thread, and on a busy machine threads wait for each other.
# Kernels and other processes that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Expected numbers are in float32, whatever the processor is fast at; tests of bfloat16 ask for it.
os.environ.setdefault("MINIGPT_LAB_PRECISION", "float32")

# A shell's background job ignores Ctrl-C, and so would all that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
import torch
from helpers import random_model
from hypothesis import settings

import minigpt_lab as lab
from minigpt_lab.experiments.records import RECORD

settings.register_profile("lab", deadline=None)  # a loaded machine is no fault
settings.load_profile("lab")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items) -> None:
    """Put slow tests first, so that two workers end at about the same time."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_runtest_setup(item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(params=["gpt2", "llama", "opt"])
def family(request) -> str:
    """Three families that differ in most things; ``tests/models`` goes through all of them."""
    return request.param


@pytest.fixture
def model(family):
    return random_model(family)


@pytest.fixture
def probe() -> torch.Tensor:
    return torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def padded(probe):
    """A batch with padding on the left of one row and on the right of the other."""
    mask = torch.ones_like(probe)
    mask[0, -4:] = 0
    mask[1, :3] = 0
    return {"input_ids": probe, "attention_mask": mask}


@pytest.fixture(scope="session")
def tiny():
    """The tiny trained Llama with its tokenizer; read-only."""
    return lab.load_model("tiny-llama", device="cpu")


@pytest.fixture(scope="session")
def tiny_domain():
    return lab.load_domain("tiny-law")


@pytest.fixture(scope="session")
def tiny_statistics(tiny, tiny_domain):
    """Of the tiny model on its domain, 512 tokens; read-only."""
    model, tokenizer = tiny
    batches = lab.tokenize(tiny_domain.calibration, tokenizer, seq_len=64, max_tokens=512)
    return lab.collect_statistics(model, batches, progress=False)


@dataclass(frozen=True)
class KilledSweep:
    """A sweep of three runs that was killed half way and called again."""

    grid: Path
    folder: Path
    before: dict[str, bytes]  # records when it was killed
    printed: str  # by the second call
    status: int


@pytest.fixture(scope="session")
def tiny_sweep(tmp_path_factory) -> KilledSweep:
    """Three runs of notebook 03 on a tiny model, through the command line; read-only."""
    home = tmp_path_factory.mktemp("sweep")
    grid, folder = home / "tiny_sizes.yaml", home / "runs"
    grid.write_text(
        "notebook: 03_contextual_pruning\n"
        "parameters: {model_name: tiny-llama, other_domain_name: tiny-law, seq_len: 64,\n"
        "             calibration_tokens: 1024, test_tokens: 512, epsilon_embedding: null}\n"
        "grid: {domain_name: [tiny-law, tiny-games], quantile_activation: [0.1, 0.5]}\n"
        "exclude: [{domain_name: tiny-games, quantile_activation: 0.5}]\n"
        "jobs: 2\n"
    )
    command = [sys.executable, "-m", "minigpt_lab", "sweep", str(grid), "--out", str(folder)]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 1800
    while not list(folder.glob(f"*/{RECORD}")):
        assert first.poll() is None and time.monotonic() < deadline, "no run was finished in time"
        time.sleep(0.2)
    first.send_signal(signal.SIGKILL)
    first.wait()
    before = {path.parent.name: path.read_bytes() for path in folder.glob(f"*/{RECORD}")}
    second = subprocess.run(command, capture_output=True, text=True)
    return KilledSweep(grid, folder, before, second.stdout + second.stderr, second.returncode)
