"""Notebook 02 in a real browser: JupyterLab, driven as a reader would, by mouse and keyboard."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from chromium import chromium_page
from playwright.sync_api import Page, expect

from minigpt_lab.experiments.parameters import NOTEBOOKS
from minigpt_lab.experiments.records import ROOT

NOTEBOOK = "02_threshold_sweep.ipynb"
PARAMETERS = {
    "model_name": "tiny-llama", "domain_name": "tiny-law", "explored_domain_names": ["tiny-games"],
    "epsilon_linear": [], "epsilon_activation": [0.03, 0.1], "epsilon_embedding": [],
    "epsilon_all": [], "controls": [], "seq_len": 64, "calibration_tokens": 1024,
    "validation_tokens": 256, "test_tokens": 256,
}  # fmt: skip
SETTINGS = {  # no news, nothing written back, and cells outside the window stay in the page
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    "notebook-extension/tracker": {"windowingMode": "none"},
    "docmanager-extension/plugin": {"autosave": False},
}


@contextlib.contextmanager
def jupyter_lab(folder: Path, state: Path) -> Iterator[Callable[[str], str]]:
    """JupyterLab of this Python on a folder; gives the address of a path in it."""
    for name, content in SETTINGS.items():
        path = state / f"settings/@jupyterlab/{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(content))
    places = {
        "JUPYTER_CONFIG_DIR": "config", "JUPYTER_DATA_DIR": "data", "IPYTHONDIR": "ipython",
        "JUPYTER_RUNTIME_DIR": "runtime", "JUPYTERLAB_SETTINGS_DIR": "settings",
        "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
    }  # fmt: skip
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(16)
    command = [
        sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1",
        f"--port={port}", "--ServerApp.port_retries=0", f"--IdentityProvider.token={token}",
        f"--ServerApp.root_dir={folder}", "--LabApp.expose_app_in_browser=True",
    ]  # fmt: skip
    variables = os.environ | {key: str(state / name) for key, name in places.items()}
    with (state / "lab.log").open("w") as log:
        server = subprocess.Popen(
            command, env=variables, stdout=log, stderr=log, start_new_session=True
        )
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 600
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{address}/api/status?token={token}", timeout=20)
                break
            if server.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"JupyterLab did not start:\n{(state / 'lab.log').read_text()}")
            time.sleep(0.2)
        yield lambda path: f"{address}/lab/tree/{path}?token={token}"
    finally:
        os.killpg(server.pid, signal.SIGTERM)  # its kernels too
        try:
            server.wait(200)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)


class Reader:
    """The first explorer of the open notebook, as the reader sees it."""

    def __init__(self, page: Page):
        self.page = page
        self.box = page.locator(".lab-x").first
        self.words = self.box.locator(".lab-x-words")
        self.slider = self.box.locator("input[type=range]")

    def epsilon(self) -> float:
        """ε in the words."""
        return float(re.search(r"ε = ([\d.e-]+):", self.words.inner_text())[1])

    def stored(self) -> int:
        """Stored parameters of the choice."""
        words = self.box.locator("[data-size=stored] .lab-x-number").inner_text()
        return int(words.replace(",", ""))

    def drag(self, panel: str, start: float, end: float) -> None:
        """With the mouse across a panel, from and to shares of its width."""
        box = self.box.locator(panel).bounding_box()
        height = box["y"] + box["height"] / 2
        self.page.mouse.move(box["x"] + start * box["width"], height)
        self.page.mouse.down()
        self.page.mouse.move(box["x"] + end * box["width"], height, steps=8)
        self.page.mouse.up()

    @contextlib.contextmanager
    def changes(self) -> Iterator[None]:
        """Within: an act after which the words must be others."""
        words = self.words.inner_text()
        yield
        expect(self.words).not_to_have_text(words, timeout=300_000)


def run_all(page: Page, address: str) -> None:
    """Open a notebook, wait for its kernel, run all of it."""
    page.goto(address)
    page.wait_for_selector("#jupyterlab-splash", state="detached", timeout=600_000)
    page.wait_for_selector(".jp-NotebookPanel .jp-Cell", timeout=600_000)
    page.wait_for_function(
        """async () => {
            const panel = window.jupyterapp.shell.currentWidget;
            if (!panel?.context) return false;
            await panel.context.ready; await panel.sessionContext.ready;
            return panel.sessionContext.session?.kernel?.status === 'idle';
        }""",
        timeout=600_000,
    )
    done = page.evaluate("() => window.jupyterapp.commands.execute('notebook:run-all-cells')")
    assert done is not False, "a cell raised"


def read_notebook(page: Page, address: str) -> None:
    """What a reader does: drag, press a key, type, choose, brush, measure."""
    run_all(page, address)
    reader = Reader(page)
    reader.box.scroll_into_view_if_needed(timeout=300_000)
    expect(reader.words).to_contain_text("ε = 0.1", timeout=300_000)
    stored = reader.stored()

    with reader.changes():  # the slider's thumb
        box, place = (
            reader.slider.bounding_box(),
            reader.slider.evaluate(
                "slider => (slider.value - slider.min) / (slider.max - slider.min)"
            ),
        )
        height = box["y"] + box["height"] / 2
        page.mouse.move(box["x"] + place * box["width"], height)
        page.mouse.down()
        page.mouse.move(box["x"] + 0.3 * box["width"], height, steps=12)
        page.mouse.up()
    dragged = reader.epsilon()
    assert dragged < 0.1 and reader.stored() > stored  # a smaller ε keeps more

    with reader.changes():
        reader.slider.focus()
        page.keyboard.press("ArrowRight")
    assert reader.epsilon() / dragged == pytest.approx(10**0.02, rel=0.01)  # one step

    with reader.changes():
        field = reader.box.locator("input[type=text]")
        field.fill("0.08")
        field.press("Enter")
    assert reader.epsilon() == 0.08
    with reader.changes():
        reader.box.locator("select[name=domain]").select_option(label="tiny-games")
    assert reader.epsilon() == 0.08
    with reader.changes():
        reader.box.locator("select[name=component]").select_option("all")
    with reader.changes():
        reader.box.get_by_label("share of each layer", exact=True).check()
    expect(reader.words).to_contain_text("The lowest 10 % of each layer")

    reader.drag(".lab-x-map", 0.5, 0.8)
    expect(reader.box.locator("[data-brush]")).to_contain_text("Brush:")
    expect(reader.box.locator(".lab-x-card h4")).to_contain_text("Layer")
    assert not reader.box.evaluate(  # the notebook scrolls; the explorer fits into its cell
        "box => box.scrollWidth > box.clientWidth + 1"
    )

    with page.expect_event("console", lambda m: m.text == "copied", timeout=60_000):
        page.evaluate(
            "navigator.clipboard.writeText = async text => "
            "{ window.copied = text; console.log('copied'); }"
        )
        reader.box.get_by_role("button", name="copy state").click()
    assert "domain=tiny-games&component=all&share=0.1" in page.evaluate("window.copied")

    page.get_by_role("button", name="measure perplexity").click()  # Python's plan followed
    result = page.locator(".lab-result").first
    expect(result).to_contain_text("perplexity", timeout=600_000)
    expect(result).to_contain_text(f"stored {reader.stored():,}")


@pytest.mark.slow
def test_the_explorer_in_a_browser(tmp_path):
    notebook = json.loads((NOTEBOOKS / NOTEBOOK).read_text(encoding="utf-8"))
    cell = next(c for c in notebook["cells"] if "parameters" in c["metadata"].get("tags", []))
    values = PARAMETERS | {"out_dir": str(tmp_path / "run")}
    cell["source"].append("".join(f"\n{name} = {value!r}" for name, value in values.items()))
    folder, state = tmp_path / "notebooks", tmp_path / "state"
    shutil.copytree(ROOT / "figures", folder / "figures")  # pictures of the first cells
    shutil.copytree(NOTEBOOKS / "diagrams", folder / "diagrams")
    state.mkdir()
    (folder / NOTEBOOK).write_text(json.dumps(notebook), encoding="utf-8")
    with jupyter_lab(folder, state) as address, chromium_page("explorer") as page:
        read_notebook(page, address(NOTEBOOK))
        page.locator(".lab-x").first.scroll_into_view_if_needed()
