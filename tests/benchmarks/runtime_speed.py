"""Speed of dense and pruned models in llama.cpp and in PyTorch, at the points of notebook 13.

``python tests/benchmarks/runtime_speed.py`` prints processor time per token of prefill (a prompt
read at once) and of decode (token by token, greedy), as ratios of dense PyTorch in float32: the
dense model, one with a trimmed vocabulary, and one with half of its FFN channels too, in every
format. One thread, one process; medians over rounds in which every variant takes its turn. Speed
depends on shapes alone, so that channels are chosen by magnitude and nothing is recovered.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import xllamacpp

import minigpt_lab as lab
from minigpt_lab.recipes.preparation import trimmed_for

PROMPT, WRITTEN = 256, 32


def pruned(model, tokenizer, domain: lab.Domain):
    """Only the tokens of the domain's calibration and train part; and half of the channels too."""
    trimmed = trimmed_for(model, tokenizer, domain, seq_len=256)
    scores = lab.score(trimmed, "magnitude", sites=("ffn",))
    plan = lab.plan_from_scores(trimmed, scores, ratio=0.5, multiple_of=32)
    return {"trimmed": trimmed, "mini": lab.shrink(trimmed, plan)}


def in_pytorch(model) -> Callable[[int, int], object]:
    """Read some tokens, then write some."""

    @torch.no_grad()
    def run(read: int, written: int) -> object:
        ids = torch.arange(5, 5 + read)[None]
        options = {"max_new_tokens": written, "min_new_tokens": written, "do_sample": False}
        return model.generate(ids, attention_mask=torch.ones_like(ids), **options)

    return run


def in_llama_cpp(path: Path) -> Callable[[int, int], object]:
    """The same for a file."""
    options = xllamacpp.CommonParams()
    options.model.path = str(path)
    options.n_ctx, options.n_parallel, options.warmup = 512, 1, False
    options.cpuparams.n_threads = options.cpuparams_batch.n_threads = 1
    options.verbosity = -1
    server = xllamacpp.Server(options)

    def run(read: int, written: int) -> object:
        request = {"prompt": [*range(5, 5 + read)], "n_predict": written, "temperature": 0}
        return server.handle_completions({**request, "ignore_eos": True, "cache_prompt": False})

    return run


def seconds(run: Callable[[int, int], object]) -> tuple[float, float]:
    """Processor seconds per token of prefill and of decode."""
    times = []
    for read, written in ((PROMPT, 1), (8, 1), (8, 1 + WRITTEN)):
        start = time.process_time()
        run(read, written)
        times.append(time.process_time() - start)
    return (times[0] - times[1]) / (PROMPT - 8), (times[2] - times[1]) / WRITTEN


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--domain", default="medical")
    parser.add_argument("--kinds", nargs="+", default=["F16", "Q8_0", "Q4_0"])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = lab.load_model(options.model, dtype="float32", device="cpu")
    models = {"dense": model, **pruned(model, tokenizer, lab.load_domain(options.domain))}
    with tempfile.TemporaryDirectory() as folder:
        runs, sizes = {}, {}
        for name, each in models.items():
            runs[name, "PyTorch float32"] = in_pytorch(each)
            sizes[name, "PyTorch float32"] = sum(p.nbytes for p in each.parameters())
            for kind in options.kinds:
                path = Path(folder) / f"{name}-{kind}.gguf"
                lab.export_gguf(each, tokenizer, path, kind=kind)
                runs[name, kind], sizes[name, kind] = in_llama_cpp(path), path.stat().st_size
        for run in runs.values():
            run(8, 2)  # warm
        found = [{key: seconds(run) for key, run in runs.items()} for _ in range(options.rounds)]
    base = ("dense", "PyTorch float32")
    print("model  format  MB  prefill ×  decode ×  (dense PyTorch float32 = 1; range over rounds)")
    for key in runs:
        cells = []
        for part in (0, 1):
            ratios = [each[base][part] / each[key][part] for each in found]
            cells.append(f"{statistics.median(ratios):.1f} ({min(ratios):.1f}–{max(ratios):.1f})")
        print(*key, f"{sizes[key] / 1e6:.0f}", *cells, sep="  ", flush=True)
    prefill, decode = (
        statistics.median(1e3 * each[base][part] for each in found) for part in (0, 1)
    )
    print(f"dense PyTorch float32: {prefill:.2f} and {decode:.2f} ms of processor time per token")


if __name__ == "__main__":
    main()
