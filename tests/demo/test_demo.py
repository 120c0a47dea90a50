"""The page's limits and answers, and what its server gives away; in a browser: tests/demo/test_browser.py."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from itertools import pairwise
from pathlib import Path
from urllib.parse import quote, urlparse

import numpy as np
import pytest
from PIL import Image

import paligemma_jax as pg
from paligemma_jax.commands.demo import demo
from paligemma_jax.demo import html
from paligemma_jax.demo.ask import Settings, Shown, ask, with_task
from paligemma_jax.demo.limits import Limits
from paligemma_jax.demo.tokens import Token, probabilities
from paligemma_jax.processing.locations import parse_detections, with_masks

DIGITS = str(Path(pg.__file__).parent / "assets" / "digits.jpg")


@pytest.fixture(scope="module")
def predictor():
    return pg.load("tiny")


def last(*arguments):
    return list(ask(*arguments))[-1]


# what a visitor may send


@pytest.fixture
def picture(tmp_path):
    """(name, size) -> a file with a black picture of that size."""

    def make(name="black.png", size=(8, 8)):
        Image.new("L", size).save(tmp_path / name)
        return str(tmp_path / name)

    return make


def test_pictures_are_opened_upright_and_in_order(picture):
    first, second = Limits().open([DIGITS, None, picture()])
    assert first.size == Image.open(DIGITS).size and second.size == (8, 8) and {first.mode, second.mode} == {"RGB"}


def test_too_many_pictures(picture):
    with pytest.raises(ValueError, match="3 pictures are too many: at most 2"):
        Limits(images=2).open([DIGITS] * 3)
    with pytest.raises(ValueError, match="no picture yet"):
        Limits().open([None, None])


def test_large_file(picture, tmp_path):
    file = Path(picture("large.bmp", (1000, 1100)))
    assert Limits(megabytes=1.2).open([str(file)])
    with pytest.raises(ValueError, match=r"^large.bmp has 1.1 MB: at most 1 MB"):
        Limits(megabytes=1).open([str(file)])


def test_decompression_bombs(picture, monkeypatch):
    """Neither is decoded: one by our limit, one by PIL's own, which is an error above twice its figure."""
    monkeypatch.setattr("paligemma_jax.demo.limits.load_image", lambda file: pytest.fail("decoded"))
    with pytest.raises(ValueError, match=r"bomb\.png has 2 megapixels: at most 1 are taken"):
        Limits(megapixels=1).open([picture("bomb.png", (2000, 1000))])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)
    with pytest.raises(ValueError, match=r"bomb\.png has too many pixels"):
        Limits(megapixels=1000).open([picture("bomb.png", (2000, 1000))])


@pytest.mark.parametrize(
    "content", [b"", b"hello", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n"]
)
def test_other_files(content, tmp_path):
    """Also what PIL would hand to Ghostscript."""
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"^x\.png is no picture that can be read here"):
        Limits().open([str(tmp_path / "x.png")])


def test_cut_off_file(tmp_path):
    (tmp_path / "half.jpg").write_bytes(Path(DIGITS).read_bytes()[:50_000])
    with pytest.raises(ValueError, match=r"^half\.jpg is damaged or cut off"):
        Limits().open([str(tmp_path / "half.jpg")])


def test_prompts():
    limits = Limits(characters=10)
    assert limits.prompt(" detect 4\n") == "detect 4"
    for text, reason in (("", "empty"), (" \n", "empty"), ("x" * 11, "11 characters: at most 10"), ("<image>ocr", "<image> cannot")):
        with pytest.raises(ValueError, match=reason):
            limits.prompt(text)


def test_limits_above_0():
    with pytest.raises(ValueError, match=r"--max\.new-tokens 0: it has to be above 0"):
        demo(limits=Limits(new_tokens=0))


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"max_new_tokens": 513}, "max new tokens is 513: it can be a whole number from 1 to 512"),
        ({"beams": 9}, "beams is 9: it can be a whole number from 1 to 8"),
        ({"seed": 0.5}, "seed is 0.5"),
        ({"top_k": -1}, "top k is -1"),
        ({"seed": "x"}, "seed is x"),
        ({"method": "Sample", "temperature": 0}, "temperature"),
        ({"method": "Sample", "top_p": 2}, "top_p"),
        ({"max_new_tokens": None}, "max new tokens is None"),
        ({"seed": float("nan")}, "seed is nan"),
    ],
)
def test_settings_beyond_the_limits(change, reason, predictor):
    """The browser's sliders do not allow them; a request by hand does."""
    (shown,) = last([predictor], Limits(), [DIGITS], "ocr", Settings(**change))
    assert shown.done and shown.error and reason in shown.error and not shown.text


# what it answers


class Seen:
    """A predictor that says what it is asked."""

    def stream(self, images, prompt, new, sampler, seed):
        yield f"{prompt} {[image.size for image in images]} {new} {sampler} {seed}"

    def generate(self, images, prompts, new, sampler):
        return [f"{prompts} {[image.size for image in images[0]]} {new} {sampler}"]


@pytest.mark.parametrize(
    "settings, said",
    [
        (Settings(), "ocr [(8, 8), (9, 9)] 128 Greedy() 0"),
        (Settings("Sample", 0.7000001, 0, 1.0, seed=3), f"ocr [(8, 8), (9, 9)] 128 {pg.Sample(0.7)} 3"),
        (Settings("Sample", 1.5, 7, 0.9, max_new_tokens=9), f"ocr [(8, 8), (9, 9)] 9 {pg.Sample(1.5, 7, 0.9)} 0"),
        (Settings("Beam", beams=3), f"['ocr'] [(8, 8), (9, 9)] 128 {pg.Beam(3)}"),
    ],
)
def test_what_the_model_is_asked(settings, said, picture):
    files = [picture("a.png"), None, picture("b.png", (9, 9))]
    assert last([Seen()], Limits(), files, " ocr", settings) == [Shown(said, done=True)]


def test_streams(predictor):
    """Text grows piece by piece, and is done at the end only."""
    steps = [shown for (shown,) in ask([predictor], Limits(), [DIGITS], "caption en", Settings())]
    assert len(steps) > 2 and not any(step.done for step in steps[:-1])
    assert all(b.text.startswith(a.text) for a, b in pairwise(steps)) and len({step.text for step in steps}) > 2
    assert steps[-1].text == predictor.generate(DIGITS, "caption en")[0]


def test_two_models_take_turns(predictor):
    steps = list(ask([predictor, predictor], Limits(), [DIGITS], "caption en", Settings()))
    assert steps[0][0].text and not steps[0][1].text and steps[1][1].text  # the second need not wait for the end of the first
    assert steps[-1] == [Shown("four digits: 4, 3, 2 and 3", done=True)] * 2


def test_one_model_fails_alone(predictor):
    class Broken:
        def stream(self, *_, **__):
            yield "four"
            raise RuntimeError("a secret path")

    broken, good = last([Broken(), predictor], Limits(), [DIGITS], "ocr", Settings())
    assert broken.text == "four" and broken.error.startswith("Something went wrong") and "secret" not in broken.error
    assert good == Shown("4 3 2 3", done=True)


@pytest.mark.parametrize(
    "prompt, task, expected",
    [
        ("", "Detect", "detect "),
        ("caption en", "Ask", "answer en "),
        ("detect cat ; dog", "Segment", "segment cat ; dog"),
        ("segment cat", "Ask", "answer en cat"),
        ("detect cat", "Caption", "caption en"),
        ("whatever this is", "Read text", "ocr"),
    ],
)
def test_task_buttons(prompt, task, expected):
    assert with_task(task, prompt) == expected


def test_boxes_and_masks():
    """Boxes as soon as they are said; masks when all is said, from the model's codec; without a codec the reason beside the boxes."""
    masked = "<loc0000><loc0000><loc1023><loc0512>" + "<seg001>" * 16 + " 4"

    class Pointing:
        def stream(self, *_, **__):
            yield from (masked[:20], masked[20:60], masked[60:])

        def detections(self, text, picture):
            if codec is None:
                raise ValueError("no mask codec beside the checkpoint")
            return with_masks(parse_detections(text, picture.size), picture.size, codec)

    codec = pg.load("tiny").codec
    steps = [shown for (shown,) in ask([Pointing()], Limits(), [DIGITS], "segment 4", Settings())]
    assert [len(step.found) for step in steps] == [0, 1, 1, 1] and steps[-1].found[0].label == "4"
    assert [thing.mask is not None for step in steps for thing in step.found] == [False, False, True]
    codec = None
    (shown,) = last([Pointing()], Limits(), [DIGITS], "segment 4", Settings())
    assert shown.error == "no mask codec beside the checkpoint" and len(shown.found) == 1


def test_boxes_scale_with_the_picture(picture):
    """They are drawn on a copy that fits a screen."""

    class Pointing:
        def stream(self, *_, **__):
            yield "<loc0000><loc0000><loc1023><loc1023> all"

    (shown,) = last([Pointing()], Limits(), [picture("wide.png", (4000, 1000))], "detect all", Settings())
    assert shown.picture.size == (1600, 400) and shown.found[0].box == (0, 0, 1600, 400)


def test_probabilities(predictor):
    """Of every token, as generation found them; they are the likeliest, for greedy took them."""
    answer = predictor.answers(DIGITS, "caption en", 32)[0]
    found = probabilities(predictor, [Image.open(DIGITS)], "caption en", answer.text)
    np.testing.assert_allclose([token.probability for token in found], np.exp(answer.log_probabilities), atol=1e-5)
    assert "".join(token.text or "" for token in found) == answer.text and found[-1].text is None
    for token in found:
        values = [p for _, p in token.others]
        assert len(values) == 3 and values == sorted(values, reverse=True) and values[0] <= token.probability and sum(values) + token.probability <= 1


def test_programs_are_forgotten(monkeypatch, picture):
    """Every other setting compiles; visitors may not fill the process."""
    cleared, file = [], picture()
    monkeypatch.setattr("jax.clear_caches", lambda: cleared.append(1))
    for n in range(130):
        last([Seen()], Limits(), [file], "ocr", Settings("Beam", beams=n % 8 + 1, max_new_tokens=32 * (n // 8) + 1))
    assert len(cleared) == 2


def test_html_is_escaped():
    bad = "<script>alert(1)</script>${1+1}{{x}}"
    for shown in (Shown(bad), Shown(bad, done=True), Shown(error=bad)):
        assert "<script" not in html.answer(shown) and "&lt;script&gt;" in html.answer(shown)
    token = html.tokens([Token(bad, 0.5, ((bad, 0.25), (None, 0.125)))])
    assert "<script" not in token and "50%" in token and "25%" in token and "12%" in token
    assert "<script" not in html.header([bad]) + html.name(bad)


# what its server gives away


@pytest.fixture(scope="module")
def address(predictor):
    from paligemma_jax.demo.server import served

    with served({"tiny": predictor}, Limits(megabytes=1), port=0) as address:
        yield address.rstrip("/")


def ask_server(url, data=None, **headers):
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=20) as reply:
            return reply.status, reply.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def upload(address, content, name="x.png"):
    body = b'--b\r\nContent-Disposition: form-data; name="files"; filename="%s"\r\n\r\n%s\r\n--b--\r\n' % (name.encode(), content)
    return ask_server(f"{address}/gradio_api/upload", body, **{"Content-Type": "multipart/form-data; boundary=b"})


def test_page_asks_no_other_server(address):
    status, page = ask_server(address)
    assert status == 200 and b"googleapis" not in page and b"gstatic" not in page and b"huggingface.co" not in page


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "../../../../etc/passwd", __file__, "pyproject.toml", "~/.bashrc", "/proc/self/environ", "/tmp", DIGITS]
)
def test_no_file_outside(address, path):
    for route in ("file=", "file/"):
        for written in (path, quote(path, safe="")):
            status, body = ask_server(f"{address}/gradio_api/{route}{written}")
            assert status in (403, 404) and b"root:" not in body


def test_own_folder_only(address):
    """An upload is served back; from its folder no path leads out."""
    status, body = upload(address, b"hello")
    (path,) = json.loads(body)
    assert status == 200 and ask_server(f"{address}/gradio_api/file={path}") == (200, b"hello")
    assert ask_server(f"{address}/gradio_api/file={Path(path).parent}/../../../etc/passwd")[0] in (403, 404)


@pytest.mark.parametrize(
    "route",
    ["gradio_api/file=http://127.0.0.1/x", "gradio_api/file=https:/example.com", "gradio_api/proxy=https://example.com", "gradio_api/vibe-code"]
    + ["monitoring", "docs", "openapi.json", "gradio_api/openapi.json", "gradio_api/run/answer", "gradio_api/call/answer", "gradio_api/token"],
)
def test_no_other_route(address, route):
    assert ask_server(f"{address}/{route}")[0] == 404


def test_long_uploads(address):
    assert upload(address, b"x" * 900_000)[0] == 200
    assert upload(address, b"x" * 1_500_000)[0] == 413  # Gradio's limit
    assert upload(address, b"x" * 3_000_000)[0] == 413  # the fence's, by the length that is announced
    assert ask_server(f"{address}/gradio_api/queue/join", b"x" * 1_500_000)[0] == 413


def run_by_hand(address, picture):
    """What the queue says to a request that no browser sends: Run, with this as the first picture."""
    config = json.loads(ask_server(f"{address}/config")[1])
    number, answer = next((n, one) for n, one in enumerate(config["dependencies"]) if len(one["inputs"]) > 5)
    values = [picture] + [None] * (len(answer["inputs"]) - 9) + ["ocr", *vars(Settings()).values()]
    body = {"data": values, "fn_index": answer.get("id", number), "session_hash": "byhand"}
    status, _ = ask_server(f"{address}/gradio_api/queue/join", json.dumps(body).encode(), **{"Content-Type": "application/json"})
    assert status == 200
    return ask_server(f"{address}/gradio_api/queue/data?session_hash=byhand")[1].decode()


def test_pictures_by_hand(address):
    """Paths and addresses in the place of an upload are neither read nor fetched; an upload is."""
    meta = {"meta": {"_type": "gradio.FileData"}}
    (path,) = json.loads(upload(address, Path(DIGITS).read_bytes())[1])
    assert "4 3 2 3" in run_by_hand(address, {"path": path, **meta})
    for bad in ("/etc/passwd", DIGITS, "http://127.0.0.1:9/x.png", "https://example.com/x.png"):
        said = run_by_hand(address, {"path": bad, **meta})
        assert '"success":false' in said.replace(" ", "") and "4 3 2 3" not in said and "root:" not in said
        assert ("no addresses" in said) == ("://" in bad)


def test_loopback_unless_told_otherwise(address):
    assert urlparse(address).hostname == "127.0.0.1"


def test_taken_port(address, predictor):
    from paligemma_jax.demo.server import served

    with pytest.raises(ValueError, match=r"port \d+ of 127.0.0.1 is taken"), served({"tiny": predictor}, port=urlparse(address).port):
        pass


def test_missing_extra(command, monkeypatch):
    monkeypatch.setattr("paligemma_jax.commands.demo.find_spec", lambda name: None)
    assert command("demo") == (2, "", "paligemma-jax: the page needs an extra: pip install 'paligemma-jax[demo]'\n")


@pytest.mark.parametrize("flag,value", [("--port", "99999"), ("--port", "-1"), ("--users", "0")])
def test_numbers_that_cannot_be(command, flag, value):
    code, _, err = command("demo", flag, value)
    assert code == 2 and err.startswith(f"paligemma-jax: {flag} {value}: it can be")
