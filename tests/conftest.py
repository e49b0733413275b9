"""Models and texts that tests share."""

from __future__ import annotations

import copy
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

# A shell's background job ignores Ctrl-C, and so would all that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
import torch
from hypothesis import settings
from transformers import AutoModelForCausalLM
from transformers.models.bloom import BloomConfig
from transformers.models.gemma import GemmaConfig
from transformers.models.gemma2 import Gemma2Config
from transformers.models.gemma3 import Gemma3TextConfig
from transformers.models.gpt2 import GPT2Config
from transformers.models.gpt_neox import GPTNeoXConfig
from transformers.models.llama import LlamaConfig
from transformers.models.mistral import MistralConfig
from transformers.models.opt import OPTConfig
from transformers.models.phi import PhiConfig
from transformers.models.phi3 import Phi3Config
from transformers.models.qwen2 import Qwen2Config
from transformers.models.qwen3 import Qwen3Config

import minigpt_lab as lab
from minigpt_lab.experiments.records import RECORD

settings.register_profile("lab", deadline=None)  # a loaded machine is no fault
settings.load_profile("lab")

_COMMON = {
    "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "max_position_embeddings": 64,
}  # fmt: skip
_GATED = {**_COMMON, "intermediate_size": 20, "num_key_value_heads": 2}
_MULTI_QUERY = {**_GATED, "num_key_value_heads": 1, "head_dim": 6}
CONFIGS = {
    "llama": LlamaConfig(**_GATED, tie_word_embeddings=True),
    "mistral": MistralConfig(**_GATED),
    "qwen2": Qwen2Config(**_GATED),
    "qwen3": Qwen3Config(**_GATED, head_dim=6),
    "opt": OPTConfig(**_COMMON, ffn_dim=20, word_embed_proj_dim=32, dropout=0.0),
    "opt_350m": OPTConfig(
        **_COMMON, ffn_dim=20, word_embed_proj_dim=16, do_layer_norm_before=False, dropout=0.0
    ),
    "phi": PhiConfig(**_COMMON, intermediate_size=20, resid_pdrop=0.0),
    "phi3": Phi3Config(**_GATED),
    "gemma": GemmaConfig(**_MULTI_QUERY),
    "gemma2": Gemma2Config(**_GATED, head_dim=6, sliding_window=32, query_pre_attn_scalar=6),
    "gemma3": Gemma3TextConfig(
        **_MULTI_QUERY, sliding_window=32, query_pre_attn_scalar=6, sliding_window_pattern=2
    ),
    "gpt2": GPT2Config(**_COMMON, n_inner=20, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    "gpt_neox": GPTNeoXConfig(**_COMMON, intermediate_size=20),
    "bloom": BloomConfig(**_COMMON),  # its FFN has four times the hidden size's channels
}


def random_model(family: str, seed: int = 0, layers: int = 3) -> torch.nn.Module:
    """A small model of a family with every parameter random, biases too."""
    torch.manual_seed(seed)
    config = copy.deepcopy(CONFIGS[family])
    config.num_hidden_layers = layers
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


@pytest.fixture(params=sorted(CONFIGS))
def family(request) -> str:
    return request.param


@pytest.fixture
def model(family):
    return random_model(family)


@pytest.fixture
def probe() -> torch.Tensor:
    return torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(1))


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
    batches = lab.tokenize(tiny_domain.calibration, tokenizer, 64, 512)
    return lab.collect_statistics(model, batches, progress=False)


@dataclass(frozen=True)
class KilledSweep:
    """A five-run sweep that was killed half way and called again."""

    grid: Path
    folder: Path
    before: dict[str, bytes]  # records when it was killed
    printed: str  # by the second call
    status: int


@pytest.fixture(scope="session")
def tiny_sweep(tmp_path_factory) -> KilledSweep:
    """Five runs of notebook 03 on a tiny model, through the command line; read-only."""
    home = tmp_path_factory.mktemp("sweep")
    grid, folder = home / "tiny_sizes.yaml", home / "runs"
    grid.write_text(
        "notebook: 03_contextual_pruning\n"
        "parameters: {model_name: tiny-llama, other_domain: tiny-law, seq_len: 64,\n"
        "             calibration_tokens: 1024, test_tokens: 512, epsilon_embedding: null}\n"
        "grid: {domain: [tiny-law, tiny-games], quantile_activation: [0.1, 0.3, 0.5]}\n"
        "exclude: [{domain: tiny-games, quantile_activation: 0.5}]\n"
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
