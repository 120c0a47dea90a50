"""The built site in a headless Chromium. Skipped without mkdocs or a browser."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys

import pytest
from support.paths import ROOT

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
WITHOUT_MKDOCS = importlib.util.find_spec("mkdocstrings") is None
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed"),
    pytest.mark.skipif(WITHOUT_MKDOCS, reason="mkdocs is not installed"),
]
WIDE_BLOCKS = """() => [...document.querySelectorAll('pre, pre > code, .md-typeset__table')]
    .filter(block => block.scrollWidth > block.clientWidth).map(block => block.innerText)"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        check=True,
    )
    return folder


@pytest.mark.thorough
def test_nothing_scrolls_sideways_or_loads_from_elsewhere(site):
    problems = []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.on(
            "request",
            lambda request: request.url.startswith("file:") or problems.append(request.url),
        )
        for file in sorted(site.rglob("index.html")):
            page.goto(file.as_uri())
            problems += [(str(file.parent.name), text) for text in page.evaluate(WIDE_BLOCKS)]
            assert page.evaluate("document.documentElement.scrollWidth") <= 1280, file
        browser.close()
    assert not problems
