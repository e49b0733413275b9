"""From the move of a slider to the new picture, in Chromium, on SmolLM2-135M and six domains.

    .venv/bin/python tests/benchmarks/explorer_latency.py [page.html]

Reads the page's own performance marks: a move (goal: at most 16 ms), and a whole picture, as after
another domain or component; and from a trace the processor time of their frames, which says what
the page costs where other work makes it wait. Statistics of few tokens will do: the time does not
depend on them. The page is kept where a name is given.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from playwright.sync_api import sync_playwright

sys.path.insert(0, str(Path(__file__).parents[1]))
from chromium import CHROMIUM

import minigpt_lab as lab
from minigpt_lab.widgets import ThresholdExplorer

DOMAINS = ("law", "medical", "economics", "games", "translation", "general")
MOVES = """async () => {
    const frame = () => new Promise(requestAnimationFrame);
    const box = document.querySelector('.lab-x'), slider = box.querySelector('input[type=range]');
    const [low, high] = [Number(slider.min), Number(slider.max)], found = {};
    for (const component of box.querySelectorAll('select[name=component] option')) {
        const select = component.parentElement;
        select.value = component.value; select.dispatchEvent(new Event('change'));
        await frame(); await frame();
        for (let i = 0; i < 100; i++) {
            slider.value = low + (high - low) * ((i * 37) % 100) / 100;
            slider.dispatchEvent(new Event('input'));
            await frame(); await frame();
        }
        const domains = box.querySelector('select[name=domain]');
        for (const domain of domains.options) {
            domains.value = domain.value; domains.dispatchEvent(new Event('change'));
            await frame(); await frame();
        }
    }
    for (const name of ['move', 'whole'])
        found[name] = performance.getEntriesByName(`lab-explorer:${name}`).map(e => e.duration);
    return found;
}"""


def page(path: Path) -> None:
    """Write the page of six domains, and say how large it is."""
    model, tokenizer = lab.load_model("smollm2-135m")
    statistics = {}
    for name in DOMAINS:
        batches = lab.tokenize(
            lab.load_domain(name).calibration, tokenizer, seq_len=256, max_tokens=2048
        )
        statistics[name] = lab.collect_statistics(model, batches, examples=5)
    start = time.process_time()
    explorer = ThresholdExplorer(
        model, statistics, "medical", epsilon=0.06, tokenizer=tokenizer
    )  # fmt: skip
    print(f"packed in {time.process_time() - start:.1f} s of processor time")
    block = explorer.to_html()
    path.write_text(f"<!doctype html><meta charset='utf-8'>{block}", encoding="utf-8")
    arrays = len(explorer.arrays) * 4 / 3
    print(f"page {len(block) / 1e6:.2f} MB, of which arrays {arrays / 1e6:.2f}")


def processor_times(events: list[dict], name: str) -> list[float]:
    """Processor time in milliseconds of the animation frames with a mark of a name."""
    frames = [e for e in events if e["name"] == "FireAnimationFrame" and "tdur" in e]
    begun = [e["ts"] for e in events if e["name"] == f"lab-explorer:{name}" and e["ph"] == "b"]
    return [
        frame["tdur"] / 1000
        for frame in frames
        if any(frame["ts"] <= at <= frame["ts"] + frame["dur"] for at in begun)
    ]


def told(found: list[float]) -> str:
    """Median, 99th percentile and largest, in words."""
    ordered = sorted(found)
    high = ordered[int(0.99 * len(ordered))]
    return f"median {median(found):.1f} ms, 99 % {high:.1f}, worst {ordered[-1]:.1f}"


def main() -> None:
    """Move, switch components and domains; print the marks and the processor times."""
    given = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        path = Path(given[0] if given else f"{folder}/page.html").resolve()
        if not path.exists():
            page(path)
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        opened = browser.new_page(viewport={"width": 1280, "height": 1100})
        opened.goto(path.as_uri())
        opened.wait_for_selector(".lab-x[data-milliseconds]", timeout=120_000)
        browser.start_tracing(categories=["devtools.timeline", "blink.user_timing"])
        found = opened.evaluate(MOVES)
        events = json.loads(browser.stop_tracing())["traceEvents"]
        browser.close()
        print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
        for name, times in found.items():
            print(f"{name:>6}: {len(times)} times, {told(times)}")
            print(f"        processor time of the frame: {told(processor_times(events, name))}")


if __name__ == "__main__":
    main()
