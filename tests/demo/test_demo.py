"""Limits, replies and HTML of the demo, and what its server exposes."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from urllib.parse import quote, urlparse

import numpy as np
import pytest
from PIL import Image
from support.demo_client import file_data, request, run, upload
from support.paths import DIGITS as DIGITS_FILE

import paligemma_jax as pg
from paligemma_jax.commands.demo import demo
from paligemma_jax.demo import html
from paligemma_jax.demo.ask import Reply, Settings, ask, with_task
from paligemma_jax.demo.limits import Limits
from paligemma_jax.demo.tokens import Token, token_probabilities
from paligemma_jax.processing.locations import Detection, Detections, parse_detections, with_masks

DIGITS = str(DIGITS_FILE)


@pytest.fixture(scope="module")
def predictor():
    return pg.load("tiny")


@pytest.fixture
def unscored(monkeypatch):
    """For predictors without a model: answers have no scores."""
    monkeypatch.setattr("paligemma_jax.demo.ask.score_answer", lambda *arguments: arguments[-1])


def final_replies(*arguments):
    return list(ask(*arguments))[-1]


# limits


@pytest.fixture
def picture(tmp_path):
    """(name, size) -> the path of a black picture."""

    def make(name="black.png", size=(8, 8)):
        Image.new("L", size).save(tmp_path / name)
        return str(tmp_path / name)

    return make


def test_pictures_are_opened_upright_and_in_order(picture):
    first, second = Limits().open_images([DIGITS, None, picture()])
    assert (
        first.size == Image.open(DIGITS).size
        and second.size == (8, 8)
        and {first.mode, second.mode} == {"RGB"}
    )


def test_too_many_pictures(picture):
    with pytest.raises(ValueError, match="Too many pictures: got 3, the limit is 2"):
        Limits(images=2).open_images([DIGITS] * 3)
    with pytest.raises(ValueError, match="No picture yet"):
        Limits().open_images([None, None])


def test_large_file(picture, tmp_path):
    file = Path(picture("large.bmp", (1000, 1100)))
    assert Limits(megabytes=1.2).open_images([str(file)])
    with pytest.raises(ValueError, match=r"^large.bmp is too large: 1.1 MB, the limit is 1 MB"):
        Limits(megabytes=1).open_images([str(file)])


def test_decompression_bombs(picture, monkeypatch):
    """Neither is decoded: one exceeds our limit, one twice the limit of Pillow, where Pillow
    raises."""
    monkeypatch.setattr("paligemma_jax.demo.limits.load_image", lambda file: pytest.fail("decoded"))
    with pytest.raises(ValueError, match=r"^bomb\.png must have at most 1 megapixels, got 2\.0"):
        Limits(megapixels=1).open_images([picture("bomb.png", (2000, 1000))])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)
    with pytest.raises(ValueError, match=r"at most 0\.2 megapixels, got more than 0\.2"):
        Limits(megapixels=1000).open_images([picture("bomb.png", (2000, 1000))])


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"hello",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n",
    ],
)
def test_files_that_are_not_pictures(content, tmp_path):
    """This includes EPS, which Pillow would pass to Ghostscript."""
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"^x\.png must be a (JPEG, PNG|picture, got no bytes)"):
        Limits().open_images([str(tmp_path / "x.png")])


def test_truncated_file(tmp_path):
    (tmp_path / "half.jpg").write_bytes(Path(DIGITS).read_bytes()[:50_000])
    with pytest.raises(ValueError, match=r"^half\.jpg is damaged or incomplete"):
        Limits().open_images([str(tmp_path / "half.jpg")])


def test_prompts():
    limits = Limits(characters=10)
    assert limits.check_prompt(" detect 4\n") == "detect 4"
    for text, reason in (
        ("", "empty"),
        (" \n", "empty"),
        ("x" * 11, "at most 10 characters, got 11"),
        ("<image>ocr", "Remove <image>"),
    ):
        with pytest.raises(ValueError, match=reason):
            limits.check_prompt(text)


def test_limits_must_be_positive():
    with pytest.raises(ValueError, match=r"--max\.new-tokens must be greater than 0, got 0"):
        demo(limits=Limits(new_tokens=0))
    message = r"--max\.visitor-megabytes must be from 40 \(.*\) to 1000 \(.*\), got 30"
    with pytest.raises(ValueError, match=message):
        demo(limits=Limits(visitor_megabytes=30))


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"max_new_tokens": 513}, "max new tokens must be an integer from 1 to 512, got 513"),
        ({"beams": 9}, "beams must be an integer from 1 to 8, got 9"),
        ({"seed": 0.5}, "seed must be an integer from 0 to 2147483647, got 0.5"),
        ({"top_k": -1}, "top k must be an integer from 0 to 1048576, got -1"),
        ({"seed": "x"}, "seed must be an integer from 0 to 2147483647, got x"),
        ({"method": "Sample", "temperature": 0}, "temperature"),
        ({"method": "Sample", "top_p": 2}, "top_p"),
        ({"max_new_tokens": None}, "max new tokens must be an integer from 1 to 512, got None"),
        ({"seed": float("nan")}, "seed must be an integer from 0 to 2147483647, got nan"),
    ],
)
def test_settings_out_of_range(change, reason, predictor):
    """The sliders of the page prevent them; a handmade request does not."""
    (reply,) = final_replies([predictor], Limits(), [DIGITS], "ocr", Settings(**change))
    assert reply.done and reply.error and reason in reply.error and not reply.text


# replies


class Echo:
    """A predictor that answers with its own arguments."""

    def stream(self, images, prompt, new, sampler, seed):
        yield f"{prompt} {[image.size for image in images]} {new} {sampler} {seed}"

    def generate(self, images, prompts, new, sampler):
        return [f"{prompts} {[image.size for image in images[0]]} {new} {sampler}"]


@pytest.mark.parametrize(
    "settings, expected",
    [
        (Settings(), "ocr [(8, 8), (9, 9)] 128 Greedy() 0"),
        (
            Settings("Sample", 0.7000001, 0, 1.0, seed=3),
            f"ocr [(8, 8), (9, 9)] 128 {pg.Sample(0.7)} 3",
        ),
        (
            Settings("Sample", 1.5, 7, 0.9, max_new_tokens=9),
            f"ocr [(8, 8), (9, 9)] 9 {pg.Sample(1.5, 7, 0.9)} 0",
        ),
        (Settings("Beam", beams=3), f"['ocr'] [(8, 8), (9, 9)] 128 {pg.Beam(3)}"),
    ],
)
def test_arguments_of_the_predictor(settings, expected, picture):
    files = [picture("a.png"), None, picture("b.png", (9, 9))]
    assert final_replies([Echo()], Limits(), files, " ocr", settings) == [
        Reply(expected, done=True)
    ]


def test_text_streams(predictor):
    """Text grows piece by piece; only the last reply is done."""
    steps = [reply for (reply,) in ask([predictor], Limits(), [DIGITS], "caption en", Settings())]
    assert len(steps) > 2 and not any(step.done for step in steps[:-1])
    assert all(after.text.startswith(before.text) for before, after in pairwise(steps))
    assert len({step.text for step in steps}) > 2
    assert steps[-1].text == predictor.generate(DIGITS, "caption en")[0]


def test_two_models_take_turns(predictor):
    steps = list(ask([predictor, predictor], Limits(), [DIGITS], "caption en", Settings()))
    assert (
        steps[0][0].text and not steps[0][1].text and steps[1][1].text
    )  # the second model does not wait for the first to finish
    assert steps[-1] == [Reply("four digits: 4, 3, 2 and 3", done=True)] * 2


def test_one_model_fails_alone(predictor):
    class Broken:
        def stream(self, *_, **__):
            yield "four"
            raise RuntimeError("a secret path")

    broken, good = final_replies([Broken(), predictor], Limits(), [DIGITS], "ocr", Settings())
    assert (
        broken.text == "four"
        and broken.error.startswith("Something went wrong")
        and "secret" not in broken.error
    )
    assert good == Reply("4 3 2 3", done=True)


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


def test_boxes_and_masks(unscored):
    """Boxes appear while the text streams and masks at the end; without a codec, boxes and an
    error."""
    masked = "<loc0000><loc0000><loc1023><loc0512>" + "<seg001>" * 16 + " 4"

    class Pointing:
        def stream(self, *_, **__):
            yield from (masked[:20], masked[20:60], masked[60:])

        def detections(self, answer, picture):
            if codec is None:
                raise ValueError("no mask codec")
            return with_masks(parse_detections(answer, picture.size), picture.size, codec)

    codec = pg.load("tiny").codec
    steps = [reply for (reply,) in ask([Pointing()], Limits(), [DIGITS], "segment 4", Settings())]
    assert [len(step.detections) for step in steps] == [0, 1, 1, 1] and steps[-1].detections[
        0
    ].label == "4"
    assert [box.mask is not None for step in steps for box in step.detections] == [
        False,
        False,
        True,
    ]
    codec = None
    (reply,) = final_replies([Pointing()], Limits(), [DIGITS], "segment 4", Settings())
    assert reply.error == "no mask codec" and len(reply.detections) == 1


def test_large_pictures_are_scaled_down_for_drawing(unscored, picture):

    class Pointing:
        def stream(self, *_, **__):
            yield "<loc0000><loc0000><loc1023><loc1023> all"

        def detections(self, answer, picture):
            return parse_detections(answer, picture.size)

    (reply,) = final_replies(
        [Pointing()], Limits(), [picture("wide.png", (4000, 1000))], "detect all", Settings()
    )
    assert reply.picture.size == (1600, 400) and reply.detections[0].box == (0, 0, 1600, 400)


def test_boxes_have_the_scores_of_detect(predictor):
    (reply,) = final_replies([predictor], Limits(), [DIGITS], "detect 3", Settings())
    expected = predictor.detect(DIGITS, "3")
    assert len(reply.detections) == len(expected) == 2
    for detection, reference in zip(reply.detections, expected, strict=True):
        assert detection.score == pytest.approx(reference.score, abs=1e-4)
        assert f"<small>{detection.score:.2f}</small>" in html.answer(reply)


def test_token_probabilities(predictor):
    """They equal those of generation; greedy decoding chose the most likely tokens."""
    answer = predictor.answers(DIGITS, "caption en", 32)[0]
    tokens = token_probabilities(predictor, [Image.open(DIGITS)], "caption en", answer.text)
    np.testing.assert_allclose(
        [token.probability for token in tokens], np.exp(answer.log_probabilities), atol=1e-5
    )
    assert "".join(token.text or "" for token in tokens) == answer.text and tokens[-1].text is None
    for token in tokens:
        values = [probability for _, probability in token.alternatives]
        assert len(values) == 3 and values == sorted(values, reverse=True)
        assert values[0] <= token.probability and sum(values) + token.probability <= 1


def test_compiled_programs_are_limited(monkeypatch, picture):
    """New settings compile new programs; visitors must not exhaust the process."""
    cleared, file = [], picture()
    monkeypatch.setattr("jax.clear_caches", lambda: cleared.append(1))
    for n in range(130):
        settings = Settings("Beam", beams=n % 8 + 1, max_new_tokens=32 * (n // 8) + 1)
        final_replies([Echo()], Limits(), [file], "ocr", settings)
    assert len(cleared) == 2


def test_html_is_escaped():
    bad = "<script>alert(1)</script>${1+1}{{x}}"
    for reply in (Reply(bad), Reply(bad, done=True), Reply(error=bad)):
        assert "<script" not in html.answer(reply) and "&lt;script&gt;" in html.answer(reply)
    boxes = Reply("<loc", done=True, detections=Detections([Detection(bad, (0, 0, 1, 1))]))
    assert "<script" not in html.answer(boxes) and "&lt;script&gt;" in html.answer(boxes)
    token = html.tokens([Token(bad, 0.5, ((bad, 0.25), (None, 0.125)))])
    assert "<script" not in token and "50%" in token and "25%" in token and "12%" in token
    assert "<script" not in html.header([bad]) + html.model_name(bad)


@pytest.mark.parametrize("text", ["", " ", "\n"])
def test_empty_answers_are_labeled(text):
    assert "(empty answer)" in html.answer(Reply(text, done=True))
    assert "(empty answer)" not in html.answer(Reply(text))  # not before it is complete


# the server


@pytest.fixture(scope="module")
def address(predictor):
    from paligemma_jax.demo.server import serve

    with serve({"tiny": predictor}, Limits(megabytes=1), port=0) as address:
        yield address.rstrip("/")


def test_page_refers_to_no_other_server(address):
    status, page = request(address)
    assert (
        status == 200
        and b"googleapis" not in page
        and b"gstatic" not in page
        and b"huggingface.co" not in page
    )


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "../../../../etc/passwd",
        __file__,
        "pyproject.toml",
        "~/.bashrc",
        "/proc/self/environ",
        "/tmp",
        DIGITS,
    ],
)
def test_other_files_are_not_served(address, path):
    for route in ("file=", "file/"):
        for written in (path, quote(path, safe="")):
            status, body = request(f"{address}/gradio_api/{route}{written}")
            assert status in (403, 404) and b"root:" not in body


def test_only_uploads_are_served(address):
    """No path leads out of the folder of uploads."""
    status, body = upload(address, b"hello")
    (path,) = json.loads(body)
    assert status == 200 and request(f"{address}/gradio_api/file={path}") == (200, b"hello")
    assert request(f"{address}/gradio_api/file={Path(path).parent}/../../../etc/passwd")[0] in (
        403,
        404,
    )


@pytest.mark.parametrize(
    "route",
    [
        "gradio_api/file=http://127.0.0.1/x",
        "gradio_api/file=https:/example.com",
        "gradio_api/proxy=https://example.com",
        "gradio_api/vibe-code",
    ]
    + [
        "monitoring",
        "docs",
        "openapi.json",
        "gradio_api/openapi.json",
        "gradio_api/run/answer",
        "gradio_api/call/answer",
        "gradio_api/token",
    ],
)
def test_other_routes_are_not_served(address, route):
    assert request(f"{address}/{route}")[0] == 404


def test_large_uploads_are_refused(address):
    assert upload(address, b"x" * 900_000)[0] == 200
    assert upload(address, b"x" * 1_500_000)[0] == 413  # by Gradio
    assert upload(address, b"x" * 3_000_000)[0] == 413  # by its content length
    assert request(f"{address}/gradio_api/queue/join", b"x" * 1_500_000)[0] == 413


def test_paths_and_urls_in_place_of_an_upload_are_refused(address):
    """Paths are not read, and URLs are not fetched."""
    (path,) = json.loads(upload(address, Path(DIGITS).read_bytes())[1])
    assert "4 3 2 3" in run(address, file_data(path))
    bad = ["/etc/passwd", DIGITS, "http://127.0.0.1:9/x.png", "https://example.com/x.png"]
    bad += [f"{Path(path).parent}/../../x.png", "", "a" * 5000, "a\0b", 3, ["x"]]
    for other in bad:
        reply = run(address, file_data(other))
        assert reply == "a picture must be an upload, not a URL or another file"


def test_loopback_by_default(address):
    assert urlparse(address).hostname == "127.0.0.1"


def test_port_in_use(address, predictor):
    from paligemma_jax.demo.server import serve

    with (
        pytest.raises(ValueError, match=r"port \d+ on 127.0.0.1 is in use"),
        serve({"tiny": predictor}, port=urlparse(address).port),
    ):
        pass


def test_missing_extra(command, monkeypatch):
    monkeypatch.setattr("paligemma_jax.commands.demo.find_spec", lambda name: None)
    assert command("demo") == (
        2,
        "",
        "paligemma-jax: the demo needs Gradio: pip install 'paligemma-jax[demo]'\n",
    )


@pytest.mark.parametrize(
    "flag, value, reason",
    [
        ("--port", "99999", "must be from 0 (any free port) to 65535, got 99999"),
        ("--port", "-1", "must be from 0 (any free port) to 65535, got -1"),
        ("--users", "0", "must be at least 1, got 0"),
    ],
)
def test_port_and_users_out_of_range(command, flag, value, reason):
    code, _, err = command("demo", flag, value)
    assert code == 2 and err == f"paligemma-jax: {flag} {reason}\n"
