"""The page in a headless Chromium, as a visitor meets it. Left out where there is none (Debian: apt-get install chromium)."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from PIL import Image

import paligemma_jax as pg
from paligemma_jax.demo.limits import Limits

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
DIGITS = Path(pg.__file__).parent / "assets" / "digits.jpg"
DESKTOP, PHONE = {"width": 1280, "height": 860}, {"width": 390, "height": 844}
CAPTION = "four digits: 4, 3, 2 and 3"
WAIT = 90_000  # ms, for a machine that is busy and compiles
playwright.expect.set_options(timeout=WAIT)


@pytest.fixture(scope="module")
def address():
    from paligemma_jax.demo.server import served

    predictor = pg.load("tiny")
    "".join(predictor.stream(DIGITS, "caption en"))
    with served({"tiny": predictor}, Limits(megabytes=1), port=0) as address:
        yield address


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, address):
    """(viewport) -> a page of a visitor of its own; at the end no page has asked another server or failed in its own scripts."""
    contexts, complaints = [], []

    def go(viewport=DESKTOP):
        contexts.append(browser.new_context(viewport=viewport))
        page = contexts[-1].new_page()
        page.set_default_timeout(WAIT)
        page.on("request", lambda request: request.url.startswith((address, "blob:", "data:")) or complaints.append(request.url))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(address)
        page.wait_for_selector("#run")
        return page

    yield go
    for context in contexts:
        context.close()
    assert not complaints


def says(page, text, panel=0):
    playwright.expect(page.locator(f"#answer-{panel} .answer")).to_have_text(text)
    playwright.expect(page.locator("#run")).to_be_visible()  # Stop has gone: the answer is complete


def test_upload_and_ask(visit, tmp_path):
    """A picture from the visitor's disk, a task, a prompt, the Enter key."""
    Image.open(DIGITS).transpose(Image.Transpose.ROTATE_180).save(tmp_path / "turned.png")
    page = visit()
    page.click("#picture button[aria-label='Remove Image']")
    page.set_input_files("#picture input[type=file]", tmp_path / "turned.png")
    page.wait_for_selector("#picture img")
    page.click("#tasks >> text=Ask")
    playwright.expect(page.locator("#prompt textarea")).to_have_value("answer en ")
    playwright.expect(page.locator("#prompt textarea")).to_be_focused()
    page.keyboard.type("how many digits?")
    page.keyboard.press("Enter")
    says(page, "4")


def test_text_grows(visit):
    page = visit()
    page.evaluate(
        """() => { window.seen = []; new MutationObserver(() => seen.push(document.querySelector('#answer-0 .answer')?.innerText))
        .observe(document.querySelector('#answer-0'), {subtree: true, childList: true, characterData: true}); }"""
    )
    page.click("#tasks >> text=Caption")
    says(page, CAPTION)
    seen = [text for text in page.evaluate("seen") if text]
    assert any(CAPTION.startswith(text) and text != CAPTION for text in seen), seen


def test_errors_are_sentences(visit, tmp_path):
    page = visit()
    page.fill("#prompt textarea", "")
    page.click("#run")
    says(page, "The prompt is empty: choose a task, or write one.")
    (tmp_path / "note.png").write_text("no picture")
    page.click("#picture button[aria-label='Remove Image']")
    page.click("#tasks >> text=Read text")
    says(page, "There is no picture yet: drop, paste or take one, or try an example.")
    page.set_input_files("#picture input[type=file]", tmp_path / "note.png")
    page.wait_for_selector("#picture img")
    page.click("#run")
    says(page, "note.png is no picture that can be read here: take JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF.")
    assert page.locator("#answer-0 [role=alert]").count() == 1
    page.click("#examples >> text=ocr")
    says(page, "4 3 2 3")


def test_boxes_and_how_sure(visit):
    """The boxes are drawn, the words behind them and every token's probability are there on demand; the next question clears all that."""
    page = visit()
    page.click("#examples >> text=detect 4")
    playwright.expect(page.locator("#answer-0 .thing")).to_have_text("4")
    width = page.wait_for_selector("#model-0 .drawn img").evaluate("async e => { await e.decode(); return e.naturalWidth; }")
    assert width == Image.open(DIGITS).width
    page.click("#answer-0 summary")
    assert page.inner_text("#answer-0 code").startswith("<loc")
    page.click("#sure")
    playwright.expect(page.locator("#tokens-0 .tokens > div")).to_have_count(7)  # four <loc>, " ", "4" and the end
    page.click("#examples >> text=ocr")
    says(page, "4 3 2 3")
    assert page.locator("#model-0 .drawn img").count() == 0 and page.locator("#tokens-0 .tokens").count() == 0


def test_two_visitors_at_once(visit):
    pages = [visit(), visit(PHONE)]
    for page, example in zip(pages, ("caption en", "ocr")):
        page.click(f"#examples >> text={example}")
    for page, answer in zip(pages, (CAPTION, "4 3 2 3")):
        says(page, answer)


def test_phone(visit):
    """Nothing is wider than the screen or cut off, and the answer comes into view by itself."""
    page = visit(PHONE)
    page.click("#run")
    says(page, CAPTION)
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    for button in page.locator("#tasks button").all():
        assert button.evaluate("e => e.scrollWidth <= e.clientWidth")
    page.wait_for_function("document.querySelector('#answer-0 .answer').getBoundingClientRect().bottom <= innerHeight")
