"""ONNX by the recipe in notebooks/README.md: how far onnxruntime's logits are from PyTorch's.

``pip install onnxscript onnxruntime`` (120 MB, which no other test needs), then ``python
tests/benchmarks/onnx_gap.py``: for tiny models of several families, pruned at random, the largest
difference at the example's and at other batch sizes and lengths, and the processor time of the
export. Fails above 1e-4.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
import time
import warnings
from pathlib import Path

import onnxruntime
import torch

import minigpt_lab as lab

sys.path.insert(0, str(Path(__file__).parents[1]))
from helpers import logits, random_model, random_plan

GUIDE = Path(__file__).parents[2] / "notebooks" / "README.md"
FAMILIES = ["llama", "qwen3", "opt", "phi", "gpt2", "gpt_neox", "bloom"]
SIZES = ((2, 8), (1, 5), (3, 20))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", default=FAMILIES)
    (recipe,) = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print("family  largest gap  seconds to export")
    for family in parser.parse_args().families:
        model = random_model(family)
        mini = lab.shrink(model, random_plan(model, 3, vocabulary=False))
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            start = time.process_time()
            exec(recipe, {"mini": mini, "torch": torch})
            seconds = time.process_time() - start
            session = onnxruntime.InferenceSession("mini.onnx")
        gaps = []
        for size in SIZES:
            ids = torch.randint(3, 97, size)
            found = torch.from_numpy(session.run(None, {"input_ids": ids.numpy()})[0])
            gaps.append((found - logits(mini, ids)).abs().max().item())
        print(f"{family}  {max(gaps):.1e}  {seconds:.0f}", flush=True)
        assert max(gaps) < 1e-4, f"{family}: another model in onnxruntime"


if __name__ == "__main__":
    main()
