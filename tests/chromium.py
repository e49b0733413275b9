"""A real Chromium for tests (``apt-get install chromium``).

Without one they are skipped, but fail where ``CI`` is set.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator

import pytest
from playwright.sync_api import Page, sync_playwright

from minigpt_lab.experiments.records import ROOT

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
SHOTS = ROOT / "runs" / "browser"


@contextlib.contextmanager
def chromium_page(shot: str, width: int = 1280, **options) -> Iterator[Page]:
    """A page that may not complain; its screenshot is left in ``runs/browser/``."""
    if CHROMIUM is None:
        reason = "no chromium on the path: apt-get install chromium"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    complaints = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        page = browser.new_page(viewport={"width": width, "height": 1100}, **options)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on(
            "console",
            lambda message: complaints.append(message.text) if message.type == "error" else None,
        )
        try:
            yield page
        finally:
            SHOTS.mkdir(parents=True, exist_ok=True)
            page.screenshot(path=SHOTS / f"{shot}.png", full_page=True)
            browser.close()
    assert not complaints, complaints  # this file is no test: pytest does not say what it was
