"""From the move of a slider to the new picture, on SmolLM2-135M and six domains.

    .venv/bin/python tests/benchmarks/explorer_latency.py

Prints milliseconds (goal: at most 150) and, as ratios within the run, what the kept background
saves and what share the plan takes. Statistics of few tokens will do: the time does not depend on
them.
"""

from __future__ import annotations

import time
from statistics import median

import minigpt_lab as lab
from minigpt_lab.widgets.pruning import ThresholdExplorer

DOMAINS = ("law", "medical", "economics", "games", "translation", "general")
REPEATS = 15


def milliseconds(act) -> float:
    """How long one call takes."""
    start = time.perf_counter()
    act()
    return 1e3 * (time.perf_counter() - start)


def main() -> None:
    """Move, switch domains, and redraw everything, turn by turn."""
    model, tokenizer = lab.load_model("smollm2-135m")
    statistics = {}
    for name in DOMAINS:
        batches = lab.tokenize(
            lab.load_domain(name).calibration, tokenizer, seq_len=256, max_tokens=512
        )
        statistics[name] = lab.collect_statistics(model, batches)
    explorer = ThresholdExplorer(model, statistics, "medical", epsilon=0.05)
    explorer.show(interactive=True)  # draws all domains ahead, as a notebook does
    for box in explorer.active.values():  # the costliest plan: all components
        box.value = True
    slider, times = explorer.epsilon["activation"], {"move": [], "domain": [], "plan": []}
    for turn in range(REPEATS):
        value, domain = 0.03 + 0.005 * turn, DOMAINS[turn % len(DOMAINS)]
        times["move"].append(milliseconds(lambda v=value: setattr(slider, "value", v)))
        times["plan"].append(milliseconds(lambda: explorer.size))
        times["domain"].append(milliseconds(lambda d=domain: setattr(explorer.domain, "value", d)))
    neurons = sum(len(found.pooled["linear"]) for found in explorer.magnitudes.values())
    print(f"{neurons:,} neurons of {len(DOMAINS)} domains; median of {REPEATS} [worst], ms")
    for name, found in times.items():
        print(f"{name:>8} {median(found):7.1f} [{max(found):.1f}]")
    print(f"a move / a new domain {median(times['move']) / median(times['domain']):.2f}")
    print(f"plan and size / a move {median(times['plan']) / median(times['move']):.2f}")


if __name__ == "__main__":
    main()
