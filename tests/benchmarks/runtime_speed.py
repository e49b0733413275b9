"""Speed of dense and pruned models in llama.cpp and in PyTorch, at the points of notebook 13.

``python tests/benchmarks/runtime_speed.py`` prints the speed of prefill (a prompt read at once) and
of decode (token by token, greedy) as multiples of dense PyTorch in float32: the dense model, one
with a trimmed vocabulary, and one with half of its FFN channels too, in every format. One thread,
one process; medians over rounds in which every variant takes its turn. Speed depends on shapes
alone, so that channels are chosen by magnitude and nothing is recovered.
"""

from __future__ import annotations

import argparse

import minigpt_lab as lab
from minigpt_lab import studies
from minigpt_lab.recipes.preparation import trimmed_for


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--domain", default="medical")
    parser.add_argument("--kinds", nargs="+", default=["F16", "Q8_0", "Q4_0"])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    model, tokenizer = lab.load_model(options.model, dtype="float32", device="cpu")
    # Only the tokens of the domain's calibration and train part; and half of the channels too.
    trimmed = trimmed_for(model, tokenizer, lab.load_domain(options.domain), seq_len=256)
    scores = lab.score(trimmed, "magnitude", sites=("ffn",))
    plan = lab.plan_from_scores(trimmed, scores, ratio=0.5, multiple_of=32)
    models = {"dense": model, "trimmed": trimmed, "mini": lab.shrink(trimmed, plan)}
    found = studies.runtime_speeds(
        model, tokenizer, models=models, kinds=options.kinds, repeats=options.rounds
    )
    sizes = [
        4 * each.stored if each.runtime == "PyTorch"
        else lab.gguf_size(models[each.model], tokenizer, kind=each.runtime)
        for each in found.itertuples()
    ]  # fmt: skip
    print(found.assign(MB=[size / 1e6 for size in sizes]).round(4).to_string(index=False))


if __name__ == "__main__":
    main()
