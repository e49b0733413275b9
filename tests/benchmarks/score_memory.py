"""Peak memory of scores against plain inference on the same batch.

``python tests/benchmarks/score_memory.py`` measures a random Llama, each pass in a process of its
own: the resident set on a CPU (what Python and torch take before there is a model is subtracted),
the allocator's peak on CUDA. The zeroth-order estimate may take 1.05 times what inference takes.

On Linux, malloc is told to give blocks of a MiB back once they are freed. Left alone it keeps them,
scattered, and the peak of one and the same pass moves by ten per cent from run to run.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import minigpt_lab as lab
from minigpt_lab.architectures import SITES
from minigpt_lab.calibration.spsa import estimate_gradients
from minigpt_lab.criteria.units import scored_layers
from minigpt_lab.models.runtime import inference

CONFIG = LlamaConfig(
    vocab_size=16_384, hidden_size=576, intermediate_size=1536, num_hidden_layers=12,
    num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
)  # fmt: skip
SHAPE = (4, 256)  # windows, tokens


def forward(model, batches) -> None:
    """Logits of every token, as anyone would compute them."""
    with inference(model):
        for batch in batches:
            model(input_ids=batch["input_ids"].to(model.device), use_cache=False)


def estimate(model, batches) -> None:
    """The zeroth-order gradients alone, one direction for the whole batch."""
    estimate_gradients(model, batches, list(scored_layers(model, SITES)))


def scorer(name: str, **options):
    return lambda model, batches: lab.score(model, name, batches, **options)


PASSES = {
    "inference": forward,
    "zeroth-order estimate": estimate,
    "sensitivity, zeroth-order, shared": scorer("sensitivity", per_sample=False),
    "sensitivity, zeroth-order, per sample": scorer("sensitivity"),
    "sensitivity, backprop": scorer("sensitivity", gradient="backprop"),
    "sensitivity, none": scorer("sensitivity", gradient="none"),
    "taylor element1": scorer("taylor"),
    "taylor element1, checkpointing": scorer("taylor", gradient_checkpointing=True),
    "taylor mix": scorer("taylor", variant="mix"),
    "sparsegpt": scorer("sparsegpt"),
    "sparsegpt, a layer at a time": scorer("sparsegpt", layers_per_pass=1),
    "wanda": scorer("wanda"),
    "wanda, sequential": scorer("wanda", sequential=0.2),
}


def resident() -> int:
    """Peak resident set of this process in bytes (Linux counts in KiB, macOS in bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def measure(name: str, dtype: torch.dtype) -> tuple[int, float]:
    """Peak bytes of a model and one pass over it, and the pass's seconds."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.ones(64, 64) @ torch.ones(64, 64)  # load the kernels
    base = resident()
    torch.manual_seed(0)
    default, _ = torch.get_default_dtype(), torch.set_default_dtype(dtype)
    with torch.device(device):
        model = LlamaForCausalLM(CONFIG).eval()
    torch.set_default_dtype(default)
    batches = [{"input_ids": torch.randint(CONFIG.vocab_size, SHAPE)}]
    start = time.perf_counter()
    PASSES[name](model, batches)
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else resident() - base
    return peak, seconds


def main() -> None:
    """Measure every pass in a process of its own, and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--only", choices=PASSES, help="measure one pass in this process")
    arguments = parser.parse_args()
    if arguments.only:
        print(*measure(arguments.only, getattr(torch, arguments.dtype)))
        return
    plain = None
    for name in PASSES:
        command = [sys.executable, __file__, "--dtype", arguments.dtype, "--only", name]
        settings = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=settings)
        peak, seconds = map(float, done.stdout.split())
        plain = plain or peak
        print(
            f"{name:38} {peak / 2**20:8.1f} MiB  {peak / plain:5.2f} ×  {seconds:6.1f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
