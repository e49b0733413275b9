"""Which settings of `recover` leave the lowest loss, on several domains and at several sizes.

``python tests/benchmarks/recovery_settings.py`` cuts FFN channels of SmolLM2 with `slimgpt`, trains
a copy per setting on as many tokens (half labels, half the dense model's predictions) and prints
the perplexity of the validation part before and after. ``--set warmup_ratio 0 0.05 0.2`` varies
another argument of `recover` than the learning rate. Five minutes a setting on one thread of a CPU
with AVX2.
"""

from __future__ import annotations

import argparse
import copy
import json
import time

import torch

import minigpt_lab as lab

SEQ_LEN = 256


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--domains", nargs="+", default=["law", "medical", "economics"])
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.3, 0.5], help="of the FFN")
    parser.add_argument(
        "--set", nargs="+", default=["learning_rate", "1.5e-4", "3e-4", "6e-4"], metavar="NAME"
    )
    parser.add_argument("--method", default="full", choices=("full", "lora"))
    parser.add_argument("--tokens", type=int, default=16_384)
    given = parser.parse_args()
    name, values = given.set[0], [json.loads(value) for value in given.set[1:]]
    torch.set_num_threads(1)
    model, tokenizer = lab.load_model("smollm2-135m")
    how = {"teacher": model, "loss": "mix", "method": given.method, "max_tokens": given.tokens}
    how |= {"seq_len": SEQ_LEN, "eval_every": given.tokens, "eval_characters": 16_384}
    print(f"| domain | FFN removed | {name} | before | after | CPU s |")
    print("| --- | --- | --- | --- | --- | --- |", flush=True)
    for domain in lab.load_domains(given.domains):
        batches = lab.tokenize(
            domain.calibration, tokenizer, seq_len=SEQ_LEN, max_tokens=given.tokens // 2
        )
        for ratio in given.ratios:
            cut, _ = lab.slimgpt(model, batches, ratio=ratio, sites=("ffn",), progress=False)
            for value in values:
                mini, began = copy.deepcopy(cut), time.process_time()
                options = {**how, name: value, "progress": False}
                history = lab.recover(mini, tokenizer, domain, **options)["perplexity"]
                words = f"{history.iloc[0]:.2f} | {history.min():.2f}"
                seconds = time.process_time() - began
                print(
                    f"| {domain.name} | {ratio:.0%} | {value} | {words} | {seconds:.0f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
