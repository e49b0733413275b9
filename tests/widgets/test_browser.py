"""Notebook 02 in a real browser: JupyterLab, driven as a reader would, by mouse and keyboard.

Needs ``chromium`` (``apt-get install chromium``); without it the test is skipped, but fails where
``CI`` is set. The screenshot is left in ``runs/browser/``.
"""

from __future__ import annotations

import contextlib
import hashlib
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
from playwright.sync_api import Page, expect, sync_playwright

from minigpt_lab.experiments.parameters import NOTEBOOKS
from minigpt_lab.experiments.records import ROOT

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
SHOTS = ROOT / "runs" / "browser"
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
        self.summary = page.locator(".lab-summary").first
        self.sliders = page.locator(".widget-hslider:visible")

    def picture(self) -> str:
        """Hash of the picture's bytes."""
        found = self.page.locator(".lab-figure").first.evaluate(
            """async (element) => {
                const image = element.tagName === 'IMG' ? element : element.querySelector('img');
                const bytes = await (await fetch(image.src)).arrayBuffer();
                return Array.from(new Uint8Array(bytes));
            }"""
        )
        assert bytes(found[:4]) == b"\x89PNG"
        return hashlib.sha256(bytes(found)).hexdigest()

    def epsilon(self) -> float:
        """Activation's ε in the summary."""
        return float(re.search(r"activation ε = (\S+):", self.summary.inner_text())[1])

    def share(self) -> float:
        """Share of the neurons at or below it, in percent."""
        return float(re.search(r"activation ε = \S+: ([\d.]+)%", self.summary.inner_text())[1])

    def stored(self) -> int:
        """Stored parameters of the choice."""
        words = re.search(r"stored ([\d,]+)", self.summary.inner_text())[1]
        return int(words.replace(",", ""))

    @contextlib.contextmanager
    def changes(self) -> Iterator[None]:
        """Within: an act after which both numbers and picture must be others."""
        words, picture = self.summary.inner_text(), self.picture()
        yield
        deadline = time.monotonic() + 300  # two messages: the picture may come after the words
        while self.summary.inner_text() == words or self.picture() == picture:
            assert time.monotonic() < deadline, "the explorer did not change"
            self.page.wait_for_timeout(50)


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
    """What a reader does: drag, press a key, type, choose, tick, measure."""
    run_all(page, address)
    reader = Reader(page)
    expect(reader.summary).to_contain_text("tiny-law", timeout=300_000)
    activation = reader.sliders.nth(1)  # linear, activation, embedding
    before, stored = reader.epsilon(), reader.stored()

    handle, track = activation.locator(".noUi-handle"), activation.locator(".noUi-target")
    handle.scroll_into_view_if_needed()
    grip, rail = handle.bounding_box(), track.bounding_box()
    middle = grip["y"] + grip["height"] / 2
    with reader.changes():
        page.mouse.move(grip["x"] + grip["width"] / 2, middle)
        page.mouse.down()
        page.mouse.move(rail["x"] + 0.15 * rail["width"], middle, steps=12)
        page.mouse.up()
    dragged = reader.epsilon()
    assert dragged < before and reader.stored() > stored  # a smaller ε keeps more

    with reader.changes():
        handle.focus()
        page.keyboard.press("ArrowRight")
    assert reader.epsilon() / dragged == pytest.approx(10**0.02, rel=2e-3)  # one step of the slider

    with reader.changes():
        activation.locator(".widget-readout").click()
        page.keyboard.press("Control+A")
        page.keyboard.type("0.08")
        page.keyboard.press("Enter")
    assert reader.epsilon() == 0.08
    share = reader.share()

    with reader.changes():
        page.locator(".widget-dropdown select").first.select_option("tiny-games")
    expect(reader.summary).to_contain_text("tiny-games")
    assert reader.epsilon() == 0.08 and reader.share() != share

    with reader.changes():
        page.locator(".widget-checkbox input").nth(2).check()  # embedding
    with reader.changes():
        page.get_by_role("button", name="share of each layer").first.click()
    expect(reader.summary).to_contain_text("the lowest 10% of each layer")

    page.get_by_role("button", name="measure perplexity").click()
    expect(page.locator(".lab-result").first).to_contain_text("perplexity", timeout=600_000)


@pytest.mark.slow
def test_the_explorer_in_a_browser(tmp_path):
    if CHROMIUM is None:
        reason = "no chromium on the path: apt-get install chromium"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    notebook = json.loads((NOTEBOOKS / NOTEBOOK).read_text(encoding="utf-8"))
    cell = next(c for c in notebook["cells"] if "parameters" in c["metadata"].get("tags", []))
    values = PARAMETERS | {"out_dir": str(tmp_path / "run")}
    cell["source"].append("".join(f"\n{name} = {value!r}" for name, value in values.items()))
    folder, state = tmp_path / "notebooks", tmp_path / "state"
    shutil.copytree(ROOT / "figures", folder / "figures")  # pictures of the first cells
    state.mkdir()
    (folder / NOTEBOOK).write_text(json.dumps(notebook), encoding="utf-8")
    SHOTS.mkdir(parents=True, exist_ok=True)
    complaints = []
    with jupyter_lab(folder, state) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        page = browser.new_page(viewport={"width": 1280, "height": 1100})
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on(
            "console",
            lambda message: complaints.append(message.text) if message.type == "error" else None,
        )
        try:
            read_notebook(page, address(NOTEBOOK))
            page.locator(".lab-figure").first.scroll_into_view_if_needed()
        finally:
            page.screenshot(path=SHOTS / "explorer.png")
            browser.close()
    assert complaints == []
