"""The page in a headless Chromium. Skipped without one (Debian: apt-get install chromium)."""

from __future__ import annotations

import re
import shutil

import pytest
from PIL import Image
from support.paths import DIGITS

import paligemma_jax as pg
from paligemma_jax.demo.limits import Limits

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
DESKTOP, PHONE = {"width": 1280, "height": 860}, {"width": 390, "height": 844}
CAPTION = "four digits: 4, 3, 2 and 3"
TIMEOUT = 90_000  # ms, on a busy machine that compiles
playwright.expect.set_options(timeout=TIMEOUT)


@pytest.fixture(scope="module")
def address():
    from paligemma_jax.demo.server import serve

    predictor = pg.load("tiny")
    "".join(predictor.stream(DIGITS, "caption en"))
    with serve({"tiny": predictor}, Limits(megabytes=1), port=0) as address:
        yield address


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, address):
    """(viewport) -> the page of a new visitor. No page may fail or contact another server."""
    contexts, problems = [], []

    def check_request(request):
        if not request.url.startswith((address, "blob:", "data:")):
            problems.append(request.url)

    def open_page(viewport=DESKTOP):
        contexts.append(browser.new_context(viewport=viewport))
        page = contexts[-1].new_page()
        page.set_default_timeout(TIMEOUT)
        page.on("request", check_request)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(address)
        page.wait_for_selector("#run")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not problems


def expect(page, selector):
    return playwright.expect(page.locator(selector))


def expect_answer(page, text, panel=0):
    expect(page, f"#answer-{panel} .answer").to_have_text(text)
    expect(page, "#run").to_be_visible()  # in place of Stop: the answer is complete


def run_prompt(page, prompt):
    page.fill("#prompt textarea", prompt)
    page.click("#run")


def replace_picture(page, file):
    page.click("#picture button[aria-label='Remove Image']")
    page.set_input_files("#picture input[type=file]", file)
    page.wait_for_selector("#picture img")


def test_invitation_stands_in_for_the_first_answer(visit):
    page = visit()
    expect(page, "#invitation").to_contain_text("Ask about the picture")
    expect(page, "#question #tasks button").to_have_count(5)
    expect(page, "#question #examples").to_have_count(0)  # one row of choices, not two
    page.click("#examples >> text=ocr")
    expect_answer(page, "4 3 2 3")
    expect(page, "#invitation").to_be_hidden()


def test_upload_and_ask(visit, tmp_path):
    """Uploads a picture, chooses a task, types a prompt and presses Enter."""
    Image.open(DIGITS).transpose(Image.Transpose.ROTATE_180).save(tmp_path / "turned.png")
    page = visit()
    replace_picture(page, tmp_path / "turned.png")
    page.click("#tasks >> text=Ask")
    expect(page, "#prompt textarea").to_have_value("answer en ")
    expect(page, "#prompt textarea").to_be_focused()
    page.keyboard.type("how many digits?")
    page.keyboard.press("Enter")
    expect_answer(page, "4")


def test_text_streams(visit):
    page = visit()
    page.evaluate(
        """() => {
        window.texts = [];
        const record = () => texts.push(document.querySelector('#answer-0 .answer')?.innerText);
        const changes = {subtree: true, childList: true, characterData: true};
        new MutationObserver(record).observe(document.querySelector('#answer-0'), changes);
        }"""
    )
    page.click("#tasks >> text=Caption")
    expect_answer(page, CAPTION)
    texts = [text for text in page.evaluate("texts") if text]
    assert any(CAPTION.startswith(text) and text != CAPTION for text in texts), texts


def test_errors_are_shown_as_messages(visit, tmp_path):
    page = visit()
    run_prompt(page, "")
    expect_answer(page, "The prompt is empty. Choose a task or write a prompt.")
    page.click("#picture button[aria-label='Remove Image']")
    page.click("#tasks >> text=Read text")
    expect_answer(page, "No picture yet. Upload, paste or take one, or try an example.")
    (tmp_path / "note.png").write_text("no picture")
    page.set_input_files("#picture input[type=file]", tmp_path / "note.png")
    page.wait_for_selector("#picture img")
    page.click("#run")
    formats = "JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF"
    expect_answer(page, f"note.png must be a {formats} file, got 10 bytes of something else")
    expect(page, "#answer-0 [role=alert]").to_have_count(1)
    page.click("#examples >> text=ocr")  # the invitation stays below an error
    expect_answer(page, "4 3 2 3")


def test_an_uploaded_page_is_downloaded_not_shown(visit, address):
    page = visit()
    source = page.get_attribute("#picture img", "src")
    body = {"files": {"name": "evil.html", "mimeType": "text/html", "buffer": b"<b>evil</b>"}}
    (path,) = page.request.post(f"{address}gradio_api/upload", multipart=body).json()
    for url in (source, f"{address}gradio_api/file={path}"):
        with page.expect_download(), pytest.raises(playwright.Error, match="Download is starting"):
            page.goto(url)


def test_boxes_with_scores_and_token_probabilities(visit):
    """Boxes are drawn; the text and the token probabilities are a click away; the next run clears
    everything."""
    page = visit()
    page.click("#examples >> text=detect 4")
    expect(page, "#answer-0 .detected").to_have_text(re.compile(r"^4 0\.\d\d$"))
    drawing = page.wait_for_selector("#model-0 .drawing img")
    width = drawing.evaluate("async image => { await image.decode(); return image.naturalWidth; }")
    assert width == Image.open(DIGITS).width
    page.click("#answer-0 summary >> text=raw output")
    assert page.inner_text("#answer-0 code").startswith("<loc")
    page.click("#probabilities")
    expect(page, "#tokens-0 .tokens > div").to_have_count(7)  # four <loc>, " ", "4" and the end
    run_prompt(page, "ocr")
    expect_answer(page, "4 3 2 3")
    expect(page, "#model-0 .drawing img").to_have_count(0)
    expect(page, "#tokens-0 .tokens").to_have_count(0)


def test_empty_answer_is_labeled(visit):
    page = visit()
    run_prompt(page, "detect 7")
    expect_answer(page, "(empty answer)")


def test_new_picture_clears_the_answer(visit, tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "black.png")
    page = visit()
    run_prompt(page, "detect 4")
    expect(page, "#answer-0 .detected").to_have_count(1)
    page.wait_for_selector("#model-0 .drawing img")
    replace_picture(page, tmp_path / "black.png")
    expect(page, "#answer-0 .answer").to_have_count(0)
    expect(page, "#model-0 .drawing img").to_have_count(0)
    expect(page, "#probabilities").to_be_hidden()
    expect(page, "#invitation").to_be_visible()


def test_two_visitors_at_once(visit):
    pages = [visit(), visit(PHONE)]
    for page, example in zip(pages, ("caption en", "ocr"), strict=True):
        page.click(f"#examples >> text={example}")
    for page, answer in zip(pages, (CAPTION, "4 3 2 3"), strict=True):
        expect_answer(page, answer)


def test_phone(visit):
    """Nothing overflows, the answer scrolls into view, and the settings come after it."""
    page = visit(PHONE)
    page.click("#run")
    expect_answer(page, CAPTION)
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    for button in page.locator("#tasks button").all():
        assert button.evaluate("button => button.scrollWidth <= button.clientWidth")
    page.wait_for_function(
        "document.querySelector('#answer-0 .answer').getBoundingClientRect().bottom <= innerHeight"
    )
    run, answer, settings = (
        page.locator(selector).bounding_box()["y"]
        for selector in ("#run", "#answer-0", "#settings")
    )
    assert run < answer < settings


@pytest.fixture(scope="module")
def search_address(tmp_path_factory):
    """A page with a second tab, which searches two pages of the server and uploads."""
    from paligemma_jax.demo.search import open_searcher
    from paligemma_jax.demo.server import serve
    from paligemma_jax.retrieval import retriever

    folder = tmp_path_factory.mktemp("pages")
    for name in ("navy", "teal"):
        Image.new("RGB", (60, 90), name).save(folder / f"{name}.png")
    colpali = retriever.load("tiny", size=16)
    with (
        open_searcher(colpali, [str(folder)]) as searcher,
        serve({"tiny": pg.load("tiny")}, Limits(), port=0, searcher=searcher) as address,
    ):
        yield address


@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.thorough
def test_pages_are_searched(browser, search_address, tmp_path, viewport):
    """Uploads two pages, searches, and sees all four with falling scores; nothing overflows."""
    context = browser.new_context(viewport=viewport)
    page = context.new_page()
    page.set_default_timeout(TIMEOUT)
    page.goto(search_address)
    page.click("button[role=tab] >> text=Search pages")
    expect(page, "#message").to_contain_text("The server has 2 pages")
    page.click("#search")
    expect(page, "#message .failed").to_contain_text("The prompt is empty")
    shutil.copy(DIGITS, tmp_path / "mine.jpg")
    Image.new("RGB", (50, 50), "red").save(tmp_path / "red.png")
    page.set_input_files("#pages input[type=file]", [tmp_path / "mine.jpg", tmp_path / "red.png"])
    expect(page, "#pages tbody tr").to_have_count(2)
    page.fill("#query textarea, #query input", "4 3 2 3")
    page.keyboard.press("Enter")
    expect(page, "#message").to_contain_text("The best 4 of 4 pages")
    expect(page, "#found .thumbnail-lg img").to_have_count(4)
    captions = page.locator("#found .caption-label").all_inner_texts()
    scores, names = zip(*[caption.split(" ", 1) for caption in captions], strict=True)
    assert sorted(names) == ["mine.jpg", "navy.png", "red.png", "teal.png"]
    assert [*map(float, scores)] == sorted(map(float, scores), reverse=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
    wrap = page.locator("#found .grid-wrap")
    assert wrap.evaluate("grid => grid.scrollHeight <= grid.clientHeight")  # nothing is cut off
    context.close()
