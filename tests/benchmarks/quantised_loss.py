"""Bytes on disk against loss for types of GGUF: what rounding alone costs a model.

``python tests/benchmarks/quantised_loss.py`` prints, for every type, the bytes of the file that
`export_gguf` writes, perplexity and bits per character of the `quantised` copy on a domain's test
part, and the processor time of both calls. One thread.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch

import minigpt_lab as lab


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--domain", default="medical")
    parser.add_argument("--tokens", type=int, default=4_096)
    parser.add_argument("--kinds", nargs="+", default=["F16", "Q8_0", "Q4_0"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = lab.load_model(options.model)
    test = lab.load_domain(options.domain).test
    print("kind  bytes  perplexity  bits/character  seconds to round, to write")
    for kind in options.kinds:
        start = time.process_time()
        rounded = lab.quantised(model, kind)
        between = time.process_time()
        with tempfile.TemporaryDirectory() as folder:
            path = lab.export_gguf(model, tokenizer, Path(folder) / "model.gguf", kind=kind)
            size = path.stat().st_size
        seconds = between - start, time.process_time() - between
        assert size == lab.gguf_size(model, tokenizer, kind=kind)
        loss = lab.perplexity(
            rounded, tokenizer, test, max_tokens=options.tokens, precision="float32", progress=False
        )
        print(
            f"{kind}  {size:,}  {loss.value:.3f}  {loss.bits_per_character:.4f}  "
            f"{seconds[0]:.0f}, {seconds[1]:.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
