"""Diagrams of the notebooks: committed as the code draws them, shown with words, readable."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from xml.etree import ElementTree

import nbformat
import pytest
from playwright.sync_api import sync_playwright

from minigpt_lab.figures.diagrams import write_diagrams
from minigpt_lab.figures.drawing import DIAGRAMS, alt_text, svg_text

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)


def shown(cell) -> list[tuple[str, str]]:
    """Words and name of every diagram that a cell shows."""
    return re.findall(r"!\[([^]]*)\]\(diagrams/(\w+)\.svg\)", cell.source)


def test_committed_diagrams_are_what_the_code_draws(tmp_path):
    write_diagrams(tmp_path)
    committed = {path.name: path.read_bytes() for path in (NOTEBOOKS / "diagrams").iterdir()}
    drawn = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert committed == drawn, "call `python3.11 tasks.py diagrams`"


def test_every_notebook_begins_with_a_diagram_and_says_what_it_shows():
    seen = []
    for path in sorted(NOTEBOOKS.glob("[0-9]*.ipynb")):
        first, *others = nbformat.read(path, as_version=4).cells
        assert shown(first), path.stem
        seen += shown(first) + [pair for cell in others for pair in shown(cell)]
    assert sorted(name for _, name in seen) == sorted(DIAGRAMS)
    assert all(words == alt_text(name) for words, name in seen)


@pytest.mark.parametrize("name", DIAGRAMS)
def test_a_diagram_is_readable_without_the_picture_and_in_the_dark(name):
    root = ElementTree.fromstring(svg_text(name))
    assert root.attrib["role"] == "img"
    title, style = root[0].text, root[1].text
    assert title == alt_text(name) == root.attrib["aria-label"] and 60 < len(title) < 260
    light, dark = style.split("@media (prefers-color-scheme:dark)")
    used = {name for each in root.iter() for name in each.attrib.get("class", "").split()}
    assert all(f".{name}{{" in light and f".{name}{{" in dark for name in used)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the path")
def test_words_stay_on_the_page_and_apart():
    """In a browser: every text lies inside its drawing, and no two texts lie on each other."""
    measure = """() => [...document.querySelectorAll('text')].filter(t => t.textContent).map(t => {
        const b = t.getBBox(); return [t.textContent, b.x, b.y, b.x + b.width, b.y + b.height] })"""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        for name, (height, _) in DIAGRAMS.items():
            page.set_content(svg_text(name))
            texts = page.evaluate(measure)
            for place, (words, left, top, right, bottom) in enumerate(texts):
                assert left > 4 and right < 896 and top > 0 and bottom < height, (name, words)
                for other, *box in texts[place + 1 :]:
                    apart = box[0] > right or box[2] < left or box[1] > bottom - 5
                    assert apart or box[3] < top + 5, (name, words, other)
        browser.close()
