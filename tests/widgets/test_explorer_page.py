"""The explorer on a page without a kernel, in a real Chromium; only files are served."""

from __future__ import annotations

import http.server
import re
import threading
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from chromium import chromium_page
from helpers import random_model
from playwright.sync_api import expect
from tokenizer_kinds import SCRIPTS, model_of, tokenizer_of

import minigpt_lab as lab
from minigpt_lab.widgets import ThresholdExplorer
from minigpt_lab.widgets.packing import whole_characters

pytestmark = pytest.mark.slow

SWEEP = pd.DataFrame(
    [["activation", "contextual", e, r, r / 1.1, r * 1.1] for e, r in ((0.04, 1.5), (0.08, 6.0))],
    columns=["component", "method", "epsilon", "perplexity_ratio", "ratio_low", "ratio_high"],
)
HEAD = (
    "<!doctype html><meta charset='utf-8'><meta name='viewport' content='width=device-width'>"
    "<link rel='icon' href='data:,'><title>Explorer</title>"
)


@pytest.fixture(scope="module")
def statistics(tiny, tiny_statistics):
    batches = lab.tokenize(
        lab.load_domain("tiny-games").calibration, tiny[1], seq_len=64, max_tokens=512
    )
    games = lab.collect_statistics(tiny[0], batches, examples=3, progress=False)
    return {"tiny-law": tiny_statistics, "tiny-games": games}


@pytest.fixture(scope="module")
def site(tmp_path_factory, tiny, statistics):
    """Address of a folder with pages of one and of two explorers."""
    folder = tmp_path_factory.mktemp("site")
    options = {"epsilon": 0.05, "sweeps": {"tiny-law": SWEEP}, "tokenizer": tiny[1]}
    block = ThresholdExplorer(tiny[0], statistics, "tiny-law", **options).to_html()
    (folder / "one.html").write_text(HEAD + block, encoding="utf-8")
    (folder / "two.html").write_text(HEAD + 2 * block, encoding="utf-8")
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    handler.log_message = lambda *_: None
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", folder
    server.shutdown()


class Shown:
    """What a reader sees of an explorer, and does to it."""

    def __init__(self, page, place: int = 0):
        self.page, self.box = page, page.locator(".lab-x").nth(place)
        self.box.wait_for(timeout=60_000)
        expect(self.box).to_have_attribute("data-milliseconds", re.compile(r"\d"), timeout=60_000)

    def choose(self, component: str, rule: str = "one ε", domain: str = "tiny-law") -> None:
        self.box.locator("select[name=domain]").select_option(label=domain)
        self.box.locator("select[name=component]").select_option(component)
        if component != "embedding":
            self.box.get_by_label(rule, exact=True).check()

    def type(self, threshold: str) -> None:
        field = self.box.locator("input[type=text]")
        field.fill(threshold)
        field.press("Enter")
        self.page.wait_for_timeout(60)  # two frames: the numbers are drawn

    def numbers(self) -> dict[str, int]:
        """Sizes and counts, from the text of the page."""
        words, *sizes = self.box.evaluate(
            """box => [".lab-x-words", ...["stored", "nonzero", "layers"].map(
                name => `[data-size=${name}] .lab-x-number`)
            ].map(part => box.querySelector(part).textContent.replaceAll(",", ""))"""
        )
        counts = re.findall(r"(\d+) (FFN channels|key/value groups|tokens)(?=[ .,])", words)
        return {what: int(n) for n, what in counts} | dict(
            zip(("stored", "nonzero", "layers"), map(int, sizes), strict=True)
        )


def expected(model, plan) -> dict[str, int]:
    """The same from the plan itself."""
    size = plan.predicted_size(model)
    kept = {"stored": size.stored, "nonzero": size.nonzero, "layers": size.layers_stored}
    removed = {name: sum(counts) for name, counts in plan.removed.items()}
    tokens = 0 if plan.vocabulary is None else plan.vocabulary_size - len(plan.vocabulary)
    return kept | {
        "FFN channels": removed["ffn"], "key/value groups": removed["attention"], "tokens": tokens
    }  # fmt: skip


def choices(statistics) -> list[tuple[str, str, str]]:
    """Domains, components, and thresholds among the magnitudes of both."""
    rng, rows = np.random.default_rng(0), []
    for domain, found in statistics.items():
        features = np.concatenate([found.magnitude(*key) for key in found.sums])
        channels = [found.magnitude(name, "activation") for name in found.activations]
        magnitudes = {"activation": np.concatenate(channels), "linear": features, "all": features}
        magnitudes["embedding"] = found.token_counts / found.n_tokens
        for component, values in magnitudes.items():
            some = rng.choice(values[values > 0], 2 if domain == "tiny-law" else 1)
            rows += [(domain, component, f"{epsilon:.2e}") for epsilon in (*some, 0.0)]
        rows += [(domain, "activation", "37 %"), (domain, "linear", "99 %")]
    return rows


def test_the_page_counts_what_the_plan_counts(site, tiny, statistics):
    model = tiny[0]
    with chromium_page("explorer-page") as page:
        page.goto(f"{site[0]}/one.html")
        shown = Shown(page)
        for domain, component, text in choices(statistics):
            share = text.endswith("%")
            shown.choose(component, "share of each layer" if share else "one ε", domain)
            shown.type(text)
            names = ("linear", "activation") if component == "all" else (component,)
            if share:
                options = {"quantile": {component: int(text[:-2]) / 100}}
            else:
                options = {f"epsilon_{name}": float(text) for name in names}
            if component == "all":
                options["epsilon_embedding"] = 0.0
            plan = lab.contextual_plan(model, statistics[domain], **options)
            assert shown.numbers().items() <= expected(model, plan).items(), (component, text)


def test_mouse_keyboard_and_the_address(site, tiny, statistics):
    with chromium_page("explorer-narrow", width=390) as page:
        page.goto(f"{site[0]}/two.html")
        first, second = Shown(page), Shown(page, 1)
        before = second.numbers()
        first.type("0.08")
        words = first.box.locator(".lab-x-words")
        expect(words).to_contain_text("ε = 0.08")
        expect(first.box).to_contain_text("×6.000 [5.455, 6.600], measured")
        assert second.numbers() == before  # each has a state of its own
        for shown in (first, second):
            expect(shown.box.get_by_label("one ε", exact=True)).to_be_checked()

        slider = first.box.locator("input[type=range]")
        slider.focus()
        page.keyboard.press("ArrowLeft")
        expect(words).to_contain_text("ε = 0.0764")  # a fiftieth of a decade
        expect(first.box).to_contain_text("interpolated between ε = 0.04 and 0.08")

        layers = first.box.locator(".lab-x-map")
        layers.scroll_into_view_if_needed()
        box = layers.bounding_box()
        at = [(box["x"] + a * box["width"], box["y"] + b * box["height"]) for a, b in
              ((0.6, 0.2), (0.8, 0.4))]  # fmt: skip
        page.mouse.move(*at[0])
        heading = first.box.locator(".lab-x-card h4")
        expect(heading).to_contain_text("Layer 0, channel")
        expect(first.box.locator(".lab-x-card")).to_contain_text("tiny-games")
        page.mouse.down()
        page.mouse.move(*at[1], steps=4)
        page.mouse.up()
        expect(first.box.locator("[data-brush]")).to_contain_text("in layers 0–1")
        page.keyboard.press("ArrowDown")
        expect(heading).to_contain_text("Layer 1, channel")
        page.keyboard.press("Enter")
        expect(heading).to_contain_text("removed")  # ε is at this channel
        page.keyboard.press("Escape")
        expect(first.box.locator("[data-brush]")).to_be_hidden()

        expect(first.box.locator(".lab-x-card")).to_contain_text("No passages: collect_")  # of law
        first.choose("activation", domain="tiny-games")
        layer, channel = map(int, re.findall(r"\d+", heading.inner_text()))
        found = statistics["tiny-games"].examples
        neuron = layer * (len(found.values) // tiny[0].config.num_hidden_layers) + channel
        runs, begins = whole_characters(found.tokens, found.starts, tiny[1])
        at = np.searchsorted(begins, found.places[neuron], side="right") - 1
        texts = [runs[place] for place in at]
        marks = [item.locator("mark").all_inner_texts() for item in first.box.locator("li").all()]
        assert len(marks) == 3
        for text, marked in zip(texts, marks, strict=True):
            assert text.strip() in [mark.strip() for mark in marked]

        second.choose("linear", "share of each layer", "tiny-games")
        second.type("12")
        page.wait_for_function("location.hash.includes('share=0.12')")  # once moves have ended
        numbers, address = second.numbers(), page.url
        assert "explorer=1" in address and "domain=tiny-games" in address
        page.goto("about:blank")
        page.goto(address)
        assert Shown(page, 1).numbers() == numbers
        second = Shown(page, 1)
        second.type("many")
        expect(second.box.locator("input[type=text]")).to_have_attribute("aria-invalid", "true")
        assert second.numbers() == numbers


def test_passages_of_several_scripts_are_the_text(tmp_path):
    for kind in ("byte-level", "one word"):
        tokenizer = tokenizer_of(kind)
        model = model_of(tokenizer)
        model.config.max_position_embeddings = 256
        ids = tokenizer.encode(SCRIPTS, return_tensors="pt", add_special_tokens=False)
        found = lab.collect_statistics(model, [{"input_ids": ids}], examples=1, progress=False)
        explorer = ThresholdExplorer(model, {"x": found}, "x", epsilon=0.1, tokenizer=tokenizer)
        (tmp_path / f"{kind}.html").write_text(HEAD + explorer.to_html(), encoding="utf-8")
    with chromium_page("explorer-scripts") as page:
        for kind in ("byte-level", "one word"):
            page.goto(f"file://{tmp_path}/{kind}.html")
            shown, marked = Shown(page), set()
            shown.box.locator(".lab-x-map").focus()
            page.keyboard.press("ArrowRight")
            for _ in range(20):
                page.keyboard.press("ArrowRight")
                passage = shown.box.locator(".lab-x-card li")
                text = passage.inner_text().removeprefix("…").removesuffix("…").strip()
                assert text in SCRIPTS and len(text) > 8
                marked |= {*passage.locator("mark").all_inner_texts()}
            assert any(not mark.isascii() for mark in marked)
            assert all(len(mark.strip()) <= 3 for mark in marked if not mark.isascii())


def test_everything_is_reached_by_tab_and_has_a_name(site):
    with chromium_page("explorer-dark", color_scheme="dark") as page:
        page.goto(f"{site[0]}/one.html")
        page.evaluate("document.body.style.background = '#111'")
        shown = Shown(page)
        names = []
        for _ in range(9):
            page.keyboard.press("Tab")
            names.append(
                page.evaluate(
                    "() => { const e = document.activeElement; return e.getAttribute('aria-label')"
                    " ?? e.labels?.[0]?.textContent ?? e.textContent; }"
                )
            )
        order = ["domain", "prune", "one ε", "copy link", "full screen", "threshold ε"]
        order += ["threshold, on", "Layer map"]
        assert [name[: len(part)] for name, part in zip(names, order, strict=False)] == order
        expect(shown.box).to_have_class(re.compile("lab-x-dark"))
        expect(page.get_by_role("button", name="copy link")).to_have_attribute(
            "title", "Copies the address of this page with what is chosen"
        )
        page.get_by_role("button", name="full screen").click()
        expect(page.get_by_role("button", name="leave full screen")).to_have_attribute(
            "aria-pressed", "true"
        )


def test_an_old_browser_keeps_the_picture(site):
    with chromium_page("explorer-old") as page:
        page.add_init_script("delete window.DecompressionStream")
        page.goto(f"file://{site[1]}/one.html")
        page.wait_for_timeout(300)
        expect(page.locator(".lab-explorer-still")).to_be_visible()
        assert page.locator(".lab-x").count() == 0
        assert page.evaluate("document.querySelector('.lab-explorer-still').naturalWidth") > 100


def test_a_deep_model_and_many_domains(tmp_path):
    for layers, count in ((250, 1), (3, 10)):
        model = random_model("opt", layers=layers)
        batches = [{"input_ids": torch.arange(3, 35).reshape(2, 16)}]
        found = lab.collect_statistics(model, batches, progress=False)
        statistics = {f"domain {i} <b>": found for i in range(count)}
        block = ThresholdExplorer(model, statistics, "domain 0 <b>", epsilon=0.05).to_html()
        (tmp_path / f"{count}.html").write_text(HEAD + block, encoding="utf-8")
    with chromium_page("explorer-deep") as page:
        for count in (10, 1):
            page.goto(f"file://{tmp_path}/{count}.html")
            shown = Shown(page)
            assert shown.box.locator("select[name=domain] option").count() == count
            assert shown.box.locator("select[name=component] option").count() == 2  # no merges
        expect(shown.box).to_contain_text("240 rows for 250 layers: a row shows up to 2")
