"""The system's Chromium, headless, driven by playwright; tests that need it are skipped, with a reason, without it."""

import shutil
from contextlib import contextmanager

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def need_browser() -> None:
    pytest.importorskip("playwright", reason="pages are looked at by playwright: pip install 'prunekit[dev]'")
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine to look at pages with")


@contextmanager
def open_page(width=1440):
    """Yield a page, a list that collects its console errors, and a list that collects the addresses it requests."""
    from playwright.sync_api import sync_playwright

    faults, asked = [], []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 900})
        page.set_default_timeout(60_000)
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: faults.append(str(error)))
        yield page, faults, asked
        browser.close()
