"""Boxes to text and back, parsed from any text, with scores, drawn; and the generate command."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import paligemma_jax as pg
from paligemma_jax.inference.answer import Answer
from paligemma_jax.processing.locations import (
    COLORS,
    LAST_BIN,
    Detection,
    Detections,
    box_iou,
    draw,
    location_text,
    parse_detections,
    paste,
)
from paligemma_jax.processing.mask_codec import CODES

PHOTO = Path(pg.__file__).parent / "assets" / "digits.jpg"
CAT = "<loc0256><loc0128><loc0767><loc0512> cat"
SEG = "".join(f"<seg{n:03}>" for n in range(16))


def locs(*values: int) -> str:
    return "".join(f"<loc{value:04}>" for value in values)


def rgb(color: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(color[1:]))


def test_y_comes_first_and_the_last_bin_is_the_edge():
    text = locs(0, 341, 682, 1023) + " tabby cat"
    (cat,) = parse_detections(text, (300, 600))
    assert cat == Detection("tabby cat", (100.0, 0.0, 300.0, 400.0))
    assert location_text([cat], (300, 600)) == text


class Prompts(pg.Predictor):
    """Answers nothing; keeps the prompts."""

    codec = None

    def answers(self, image, prompt, **options):
        self.processor.append(prompt)
        return [Answer("", [], [], 0.0)]

    def detections(self, answer, image):
        return Detections()


@pytest.mark.parametrize("method", ["detect", "segment"])
def test_several_labels_are_joined_in_the_prompt(method):
    prompts = []
    ask = getattr(Prompts(model=None, processor=prompts), method)
    for label in ("3", ["3"], ["3", "4"], ("a cat", "4 ; 5")):
        ask(PHOTO, label)
    expected = ["3", "3", "3 ; 4", "a cat ; 4 ; 5"]
    assert prompts == [f"{method} {text}" for text in expected]
    for label, got in ((None, "None"), ([], "[]"), (3, "3"), (["3", None], "['3', None]")):
        with pytest.raises(ValueError, match=f"label must be a str.*got {re.escape(got)}"):
            ask(PHOTO, label)


def test_a_round_trip_is_exact_to_half_a_bin():
    rng = np.random.default_rng(0)
    for _ in range(300):
        width, height = size = tuple(int(n) for n in rng.integers(40, 4000, 2))
        x, y = np.sort(rng.uniform(0, width, 2)), np.sort(rng.uniform(0, height, 2))
        if x[1] - x[0] < width / 500 or y[1] - y[0] < height / 500:
            continue  # may lose its area in rounding
        codes = tuple(rng.integers(0, 128, CODES).tolist()) if rng.random() < 0.5 else ()
        written = Detection("a b", (x[0], y[0], x[1], y[1]), codes=codes)
        (parsed,) = parse_detections(location_text([written], size), size)
        error = np.abs(np.subtract(parsed.box, written.box)) / [width, height, width, height]
        assert error.max() <= 0.5 / LAST_BIN + 1e-12
        assert (parsed.label, parsed.codes) == (written.label, written.codes)


@pytest.mark.parametrize(
    "text", [f"{CAT} ; {CAT}", f"{CAT};{CAT}", f"{CAT} {CAT}", f"{CAT}\n{CAT} ; "]
)
def test_several_detections(text):
    detections = parse_detections(text, (100, 100))
    assert [detection.label for detection in detections] == ["cat", "cat"]
    assert not detections.skipped


def test_label_and_mask_are_optional():
    (bare,) = parse_detections(locs(1, 2, 3, 4), (10, 10))
    (masked,) = parse_detections(f"{locs(1, 2, 3, 4)}{SEG} left dog", (10, 10))
    assert bare.label == "" and bare.codes == ()
    assert (masked.label, masked.codes) == ("left dog", tuple(range(16)))


INVALID_BOXES = [
    locs(1, 2, 3),
    locs(1, 2, 3, 4, 5),
    locs(1, 2, 3, 4, 5, 6, 7, 8),
    locs(500, 0, 400, 10),
    locs(0, 10, 10, 10),
    locs(10, 0, 10, 10),
    "<loc0001><loc0002><loc1024><loc0004>",
]


@pytest.mark.parametrize("box", INVALID_BOXES)
def test_an_invalid_box_is_skipped(box):
    detections = parse_detections(f"{box} dog ; {CAT}", (100, 100))
    assert [detection.label for detection in detections] == ["cat"]
    assert detections.skipped == [f"{box} dog"]


@pytest.mark.parametrize("mask", [SEG[:-8], SEG + "<seg000>", SEG[:-8] + "<seg128>"])
def test_an_invalid_mask_is_skipped(mask):
    detections = parse_detections(f"{locs(1, 2, 3, 4)}{mask} dog", (100, 100))
    assert [(detection.label, detection.codes) for detection in detections] == [("dog", ())]
    assert detections.skipped == [mask]


def test_text_without_a_box_is_skipped():
    text = f"I see: {CAT} ; nothing else <loc12> ; {SEG}"
    detections = parse_detections(text, (10, 10))
    assert len(detections) == 1
    assert detections.skipped == ["I see:", f"nothing else <loc12> ; {SEG}"]
    assert parse_detections("four digits", (10, 10)).skipped == ["four digits"]
    assert parse_detections("", (10, 10)) == []
    assert not parse_detections(" ; ", (10, 10)).skipped


PARTS = ["<loc0001>", "<loc1023>", "<loc0500>", "<loc9999>", "<seg001>", "<seg127>", "<seg999>"]
PARTS += [SEG, CAT, " ; ", ";", "<", ">", "<loc", "loc0001>", " ", "cat", "\n", "é"]
PARTS += ["<loc0003>" * 4, "<eos>", "\udcff", "<seg12>"]


def test_any_text_can_be_parsed():
    """5,000 random strings: boxes are on the image, and every loc and seg is in a detection or in
    `skipped`."""
    rng, size = np.random.default_rng(0), (640, 480)
    count = skipped = 0
    for _ in range(5000):
        text = "".join(rng.choice(PARTS, rng.integers(0, 30)).tolist())
        detections = parse_detections(text, size)
        for detection in detections:
            left, top, right, bottom = detection.box
            assert 0 <= left < right <= 640 and 0 <= top < bottom <= 480
            assert len(detection.codes) in (0, CODES) and ";" not in detection.label
        rest = "|".join(detections.skipped)
        codes = sum(len(detection.codes) for detection in detections)
        assert text.count("<loc") == 4 * len(detections) + rest.count("<loc")
        assert text.count("<seg") == codes + rest.count("<seg")
        if "\udcff" not in text:
            characters = [(character, -1.0) for character in text]
            assert parse_detections(characters, size) == [
                Detection(d.label, d.box, math.exp(-1), d.codes) for d in detections
            ]
        count, skipped = count + len(detections), skipped + len(detections.skipped)
    assert count > 2000 and skipped > 5000


INVALID_DETECTIONS = [
    (Detection("a;b", (0, 0, 1, 1)), "label"),
    (Detection("<b>", (0, 0, 1, 1)), "label"),
    (Detection("cat", (5, 0, 5, 9)), "box"),
    (Detection("cat", (0, 0, 11, 9)), "box"),
    (Detection("cat", (float("nan"), 0, 1, 9)), "box"),
    (Detection("cat", (0, 0, 1, 1), codes=(1, 2)), "2 codes"),
]


@pytest.mark.parametrize("detection, part", INVALID_DETECTIONS)
def test_an_invalid_detection_is_not_written(detection, part):
    with pytest.raises(ValueError, match=part):
        location_text([detection], (10, 10))


def test_a_score_is_the_geometric_mean_of_the_probabilities_of_box_and_label():
    box = [(locs(n), -float(n)) for n in (1, 2, 3, 4)]
    tokens = [*box, (" c", -5.0), ("at", -6.0), (" ;", -99.0), (" ", -99.0)]
    even_box = [(locs(n), -1.0) for n in (1, 2, 3, 4)]
    detections = parse_detections([*tokens, *even_box, ("", -99.0)], (10, 10))
    scores = [detection.score for detection in detections]
    np.testing.assert_allclose(scores, [math.exp(-3.5), math.exp(-1)])
    codes = [(f"<seg{n:03}>", -9.0) for n in range(16)]
    (masked,) = parse_detections([*even_box, *codes, (" cat", -1.0)], (10, 10))
    assert masked.score == math.exp(-1)
    assert parse_detections(CAT, (10, 10))[0].score is None


def test_pieces_join_to_the_answer():
    """They do so even if a character takes several tokens, or a stop text cuts the answer."""
    tokenizer = pg.load("tiny").processor.tokenizer
    ids = tokenizer.encode(f"{CAT} 漢字 ;")
    for text in (tokenizer.decode(ids), tokenizer.decode(ids)[:-4]):
        answer = Answer(text, ids, [-1.0] * len(ids), 0.0)
        pieces = [piece for piece, _ in answer.pieces(tokenizer)]
        assert "".join(pieces) == text and len(pieces) == len(ids)
        assert pieces[0] == "<loc0256>"


def test_intersection_over_union():
    assert box_iou((0, 0, 2, 2), (1, 0, 3, 2)) == pytest.approx(1 / 3)
    assert box_iou((0, 0, 1, 1), (1, 1, 2, 2)) == box_iou((0, 0, 0, 0), (0, 0, 0, 0)) == 0


def test_detect():
    tiny = pg.load("tiny")
    detections = tiny.detect(PHOTO, "3")
    assert isinstance(detections, Detections) and not detections.skipped
    assert [detection.label for detection in detections] == ["3", "3"]
    boxes = [(89, 9, 248, 191), (511, 294, 624, 439)]
    for detection, box in zip(detections, boxes, strict=True):
        assert box_iou(detection.box, box) > 0.75
        assert detection.score is not None and 0.1 < detection.score <= 1
    text = location_text(detections, (640, 480))
    assert tiny.detections(text, PHOTO)[0].score is None
    with pytest.raises(ValueError, match="no image file"):
        tiny.detect("nothing.png", "3")


def test_drawing():
    """Edges, mask and label have the label's color. The rest of the copy and the original image do
    not change."""
    white = (255, 255, 255)
    image = Image.new("RGB", (200, 100), "white")
    mask = np.zeros((100, 200), bool)
    mask[60:80, 120:150] = True
    box = Detection("one", (20, 40, 80, 90), 0.5)
    picture = draw(image, [box, Detection("two", (110, 50, 160, 90), mask=mask)])
    red, green = map(rgb, COLORS[:2])

    def pixel(x, y):
        return picture.getpixel((x, y))

    assert pixel(20, 60) == pixel(50, 90) == red and pixel(110, 60) == green
    assert pixel(50, 60) == pixel(115, 55) == white
    assert pixel(130, 70) == tuple(round(255 + (c - 255) * 115 / 255) for c in green)
    assert pixel(21, 39) == red and image.getcolors() == [(20000, white)]
    long = Detection("a very long label that fits nowhere at all", (150, 0, 200, 5))
    assert draw(image, [long, Detection("", (0, 0, 1, 1))]).size == (200, 100)


def test_masks_are_pasted_with_subpixel_accuracy():
    half = np.where(np.arange(64)[:, None] < 32, 1.0, -1.0) * np.ones((64, 64))
    expected = np.zeros((100, 50), bool)
    expected[20:40, 10:30] = True
    np.testing.assert_array_equal(paste(half, (10, 20, 30, 60), (50, 100)), expected)
    full = np.ones((64, 64))
    # The centers of one column and three rows of pixels are inside.
    assert paste(full, (10.4, 20.4, 11.4, 22.6), (50, 100)).sum() == 3
    assert paste(full, (0, 0, 50, 100), (50, 100)).all()


def test_generate_draws_all_answers_about_an_image(command, tmp_path):
    file = tmp_path / "boxes.png"
    prompts = "detect 3", "ocr", "detect 4"
    code, out, err = command("generate", "--image", PHOTO, "--prompt", *prompts, "--draw", file)
    assert code == 0 and out.count("<loc") == 12
    assert err.count("\n") == 1 and "not drawn in boxes.png: '" in err
    drawn, plain = (np.asarray(Image.open(path).convert("RGB"), int) for path in (file, PHOTO))
    for color in COLORS[:2]:  # of 3 and of 4
        assert (drawn == rgb(color)).all(-1).sum() > 500
    assert (drawn == plain).all(-1).mean() > 0.9
    assert sorted(tmp_path.iterdir()) == [file]


def test_generate_draws_several_images_to_numbered_files(command, tmp_path):
    other, draw = tmp_path / "other.jpg", tmp_path / "boxes.jpg"
    Image.open(PHOTO).save(other)
    images = "--image", PHOTO, other
    code, _, _ = command("generate", *images, "--prompt", "detect 4", "--draw", draw)
    assert code == 0
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {"other.jpg", "boxes-1.jpg", "boxes-2.jpg"}


INVALID_DRAWINGS = [
    (
        ("--prompt", "detect 4", "--draw", "boxes.xyz"),
        "--draw must be an image file such as boxes.png or boxes.jpg, got boxes.xyz",
    ),
    (("--prompt", "detect 4", "--draw", "boxes"), "--draw must be an image file"),
    (("--prompt", "detect 4", "--draw", "nowhere/boxes.png"), "no such directory: nowhere"),
    (
        (str(PHOTO), "--prompt", "<image><image> detect 4", "--draw", "boxes.png"),
        "--draw needs one image per prompt",
    ),
]


@pytest.mark.parametrize("arguments, part", INVALID_DRAWINGS)
def test_invalid_drawings_are_refused(command, tmp_path, monkeypatch, arguments, part):
    monkeypatch.chdir(tmp_path)
    code, out, err = command("generate", "--image", PHOTO, *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert part in err and not list(tmp_path.iterdir())
