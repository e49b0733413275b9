"""Cost of SlimGPT against one plain forward pass over the same calibration tokens.

``python tests/benchmarks/slimgpt_cost.py`` prunes SmolLM2 on 32 windows of 256 tokens and prints
the ratio (the goal is 2), that of reconstruction (12) and where the time goes; ``--scaling`` how
the ratio moves with tokens and width (random Llamas); ``--large`` a random model of LLaMA-7B's
shape in bfloat16 on 256 windows of 2,048 tokens, for a CUDA device: seconds, and memory beside
weights and hidden states.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import minigpt_lab as lab
from minigpt_lab.calibration import layer_runner as layerwise
from minigpt_lab.compensation import layer_by_layer, projection
from minigpt_lab.models.runtime import inference

WINDOWS, SEQ_LEN = 32, 256
PARTS = {  # what is timed: owner and name
    "embeddings": (layer_by_layer, "catch_inputs"),
    "layers": (layerwise.LayerRunner, "run"),
    "second moments": (projection.Moments, "add"),
    "choosing and refitting": (projection, "eliminate_levels"),
}


def synchronised(device: torch.device) -> float:
    """Processor time on a CPU, wall time on an accelerator."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.process_time() if device.type == "cpu" else time.perf_counter()


def forward(model, batches, **options) -> None:
    """One plain pass."""
    with inference(model):
        for batch in batches:
            model(batch["input_ids"].to(model.device), use_cache=False, **options)


def seconds(device: torch.device, function, *args, **kwargs) -> float:
    start = synchronised(device)
    function(*args, **kwargs)
    return synchronised(device) - start


def parts(model, batches, **options) -> dict[str, float]:
    """Seconds of one run's parts."""
    spent: dict[str, float] = defaultdict(float)
    originals = {name: getattr(*place) for name, place in PARTS.items()}

    def timed(name, function):
        def call(*args, **kwargs):
            start = synchronised(model.device)
            try:
                return function(*args, **kwargs)
            finally:
                spent[name] += synchronised(model.device) - start

        return call

    for name, (owner, attribute) in PARTS.items():
        setattr(owner, attribute, timed(name, originals[name]))
    try:
        total = seconds(model.device, lab.slimgpt, model, batches, progress=False, **options)
    finally:
        for name, (owner, attribute) in PARTS.items():
            setattr(owner, attribute, originals[name])
    return {**spent, "the rest": total - sum(spent.values())}


def compare(model, batches, rounds: int, **options) -> tuple[float, float]:
    """Median ratios of a run to a forward pass, with logits and without."""
    forward(model, batches, logits_to_keep=1)
    ratios = []
    for _ in range(rounds):
        cost = seconds(model.device, lab.slimgpt, model, batches, progress=False, **options)
        plain = seconds(model.device, forward, model, batches)
        bare = seconds(model.device, forward, model, batches, logits_to_keep=1)
        ratios.append((cost / plain, cost / bare))
    return tuple(statistics.median(column) for column in zip(*ratios, strict=True))


def smollm2(rounds: int) -> None:
    """The bound, and where the time goes."""
    model, tokenizer = lab.load_model("smollm2-135m")
    text = lab.load_domain("law").calibration
    batches = lab.tokenize(text, tokenizer, seq_len=SEQ_LEN, max_tokens=WINDOWS * SEQ_LEN)
    for ratio in (0.2, 0.5):
        with_logits, without = compare(model, batches, rounds, ratio=ratio)
        print(
            f"{ratio:.0%}: {with_logits:.2f} plain passes, {without:.2f} without logits", flush=True
        )
    how = {"ratio": 0.5, "sites": ["ffn"]}
    costs = [
        compare(model, batches, 1, reconstruct=fitted, **how)[0] for fitted in (False, True)
    ]  # the second is long
    print(f"reconstruction: {costs[1] - costs[0]:.1f} plain passes besides", flush=True)
    spent = parts(model, batches, ratio=0.5)
    for name, value in spent.items():
        print(f"  {name:>24} {value / sum(spent.values()):6.1%}")


def random_llama(width: int, layers: int = 4, device: str = "cpu") -> LlamaForCausalLM:
    """A Llama of LLaMA's proportions with random weights."""
    config = LlamaConfig(
        vocab_size=2_048, hidden_size=width, intermediate_size=width * 8 // 3 // 64 * 64,
        num_hidden_layers=layers, num_attention_heads=width // 64,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(device)


def scaling() -> None:
    """The ratio against tokens and width."""
    for width in (256, 512, 1024):
        model = random_llama(width)
        for tokens in (2_048, 8_192):
            ids = torch.randint(0, 2_048, (tokens // SEQ_LEN, 1, SEQ_LEN))
            batches = [{"input_ids": window} for window in ids]
            _, without = compare(model, batches, 1, ratio=0.5)
            print(f"width {width}, {tokens:,} tokens: {without:.2f}", flush=True)


def large() -> None:
    """LLaMA-7B's shape on CUDA; the published figure is 18 minutes on an A100 (20 %)."""
    config = LlamaConfig(
        vocab_size=32_000, hidden_size=4_096, intermediate_size=11_008, num_hidden_layers=32,
        num_attention_heads=32, max_position_embeddings=2_048,
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    batches = [{"input_ids": ids} for ids in torch.randint(0, 32_000, (256, 1, 2_048))]
    hidden = 256 * 2_048 * 4_096 * 2
    for ratio in (0.2, 0.5):
        for place in ("device", "cpu"):
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            options = {"ratio": ratio, "offload": place, "inplace": False}
            cost = seconds(model.device, lab.slimgpt, model, batches, **options)
            peak = torch.cuda.max_memory_allocated() - 2 * before  # its copy of the weights too
            beside = peak - (hidden if place == "device" else 0)
            print(f"{ratio:.0%}, hidden states on {place}: {cost:.0f} s, {beside / 2**30:.1f} GiB")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scaling", action="store_true")
    parser.add_argument("--large", action="store_true")
    asked = parser.parse_args()
    if asked.scaling:
        scaling()
    elif asked.large:
        large()
    else:
        smollm2(asked.rounds)


if __name__ == "__main__":
    main()
