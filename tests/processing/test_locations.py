"""Boxes: to text and back, from any text at all, with scores, drawn; and what the command does with them."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import paligemma_jax as pg
from paligemma_jax.inference.answer import Answer
from paligemma_jax.inference.pointing import pieces
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


def test_y_comes_first_and_the_last_bin_is_the_edge():
    (cat,) = parse_detections(locs(0, 341, 682, 1023) + " tabby cat", (300, 600))
    assert cat == Detection("tabby cat", (100.0, 0.0, 300.0, 400.0))
    assert location_text([cat], (300, 600)) == locs(0, 341, 682, 1023) + " tabby cat"


def test_round_trip_is_within_half_a_bin():
    rng = np.random.default_rng(0)
    for _ in range(300):
        width, height = (int(n) for n in rng.integers(40, 4000, 2))
        x, y = np.sort(rng.uniform(0, width, 2)), np.sort(rng.uniform(0, height, 2))
        if x[1] - x[0] < width / 500 or y[1] - y[0] < height / 500:
            continue  # may round to no extent
        thing = Detection("a b", (x[0], y[0], x[1], y[1]), codes=tuple(rng.integers(0, 128, CODES).tolist()) if rng.random() < 0.5 else ())
        (back,) = parse_detections(location_text([thing], (width, height)), (width, height))
        error = np.abs(np.subtract(back.box, thing.box)) / [width, height, width, height]
        assert error.max() <= 0.5 / LAST_BIN + 1e-12 and (back.label, back.codes) == (thing.label, thing.codes)


@pytest.mark.parametrize("text", [f"{CAT} ; {CAT}", f"{CAT};{CAT}", f"{CAT} {CAT}", f"{CAT}\n{CAT} ; "])
def test_several(text):
    assert [thing.label for thing in parse_detections(text, (100, 100))] == ["cat", "cat"] and not parse_detections(text, (100, 100)).skipped


def test_without_label_and_with_mask():
    (bare,) = parse_detections(locs(1, 2, 3, 4), (10, 10))
    (masked,) = parse_detections(f"{locs(1, 2, 3, 4)}{SEG} left dog", (10, 10))
    assert bare.label == "" and bare.codes == () and (masked.label, masked.codes) == ("left dog", tuple(range(16)))


@pytest.mark.parametrize("wrong", [
    locs(1, 2, 3), locs(1, 2, 3, 4, 5), locs(1, 2, 3, 4, 5, 6, 7, 8), locs(500, 0, 400, 10), locs(0, 10, 10, 10), locs(10, 0, 10, 10),
    "<loc0001><loc0002><loc1024><loc0004>",
])  # fmt: skip
def test_no_box_is_invented(wrong):
    found = parse_detections(f"{wrong} dog ; {CAT}", (100, 100))
    assert [thing.label for thing in found] == ["cat"] and found.skipped == [f"{wrong} dog"]


@pytest.mark.parametrize("wrong", [SEG[:-8], SEG + "<seg000>", SEG[:-8] + "<seg128>"])
def test_no_mask_is_invented(wrong):
    found = parse_detections(f"{locs(1, 2, 3, 4)}{wrong} dog", (100, 100))
    assert [(thing.label, thing.codes) for thing in found] == [("dog", ())] and found.skipped == [wrong]


def test_what_is_no_box_is_told():
    found = parse_detections(f"I see: {CAT} ; nothing else <loc12> ; {SEG}", (10, 10))
    assert len(found) == 1 and found.skipped == ["I see:", f"nothing else <loc12> ; {SEG}"]
    assert parse_detections("four digits", (10, 10)).skipped == ["four digits"] and parse_detections("", (10, 10)) == [] and not parse_detections(" ; ", (10, 10)).skipped


def test_any_text_will_do():
    """5,000 random strings: no exception; what is found lies on the image, and every loc and seg is in a detection or told."""
    rng = np.random.default_rng(0)
    parts = ["<loc0001>", "<loc1023>", "<loc0500>", "<loc9999>", "<seg001>", "<seg127>", "<seg999>", SEG, CAT, " ; ", ";", "<", ">", "<loc",
             "loc0001>", " ", "cat", "\n", "é", "<loc0003>" * 4, "<eos>", "\udcff", "<seg12>"]  # fmt: skip
    found = skipped = 0
    for _ in range(5000):
        text = "".join(rng.choice(parts, rng.integers(0, 30)).tolist())
        things = parse_detections(text, (640, 480))
        for thing in things:
            left, top, right, bottom = thing.box
            assert 0 <= left < right <= 640 and 0 <= top < bottom <= 480 and len(thing.codes) in (0, CODES) and ";" not in thing.label
        kept, told = (4 * len(things), sum(len(thing.codes) for thing in things)), "|".join(things.skipped)
        assert (text.count("<loc"), text.count("<seg")) == (kept[0] + told.count("<loc"), kept[1] + told.count("<seg"))
        if "\udcff" not in text:
            assert parse_detections([(character, -1.0) for character in text], (640, 480)) == [Detection(t.label, t.box, math.exp(-1), t.codes) for t in things]
        found, skipped = found + len(things), skipped + len(things.skipped)
    assert found > 2000 and skipped > 5000


@pytest.mark.parametrize("thing, told", [
    (Detection("a;b", (0, 0, 1, 1)), "label"), (Detection("<b>", (0, 0, 1, 1)), "label"), (Detection("cat", (5, 0, 5, 9)), "box"),
    (Detection("cat", (0, 0, 11, 9)), "box"), (Detection("cat", (float("nan"), 0, 1, 9)), "box"), 
    (Detection("cat", (0, 0, 1, 1), codes=(1, 2)), "2 codes"),
])  # fmt: skip
def test_what_cannot_be_read_back_is_not_written(thing, told):
    with pytest.raises(ValueError, match=told):
        location_text([thing], (10, 10))


def test_scores_are_the_mean_of_a_things_own_tokens():
    tokens = [
        ("<loc0001>", -1.0),
        ("<loc0002>", -2.0),
        ("<loc0003>", -3.0),
        ("<loc0004>", -4.0),
        (" c", -5.0),
        ("at", -6.0),
        (" ;", -99.0),
        (" ", -99.0),
    ]
    things = parse_detections([*tokens, ("<loc0001>", -1.0), ("<loc0002>", -1.0), ("<loc0003>", -1.0), ("<loc0004>", -1.0), ("", -99.0)], (10, 10))
    np.testing.assert_allclose([thing.score for thing in things], [math.exp(-3.5), math.exp(-1)])
    masked = parse_detections([(f"<loc{n:04}>", -1.0) for n in (1, 2, 3, 4)] + [(f"<seg{n:03}>", -9.0) for n in range(16)] + [(" cat", -1.0)], (10, 10))
    assert masked[0].score == math.exp(-1) and parse_detections(CAT, (10, 10))[0].score is None


def test_pieces_join_to_the_answer():
    """Also where a character has several tokens, and where a stop text has cut the answer."""
    tokenizer = pg.load("tiny").processor.tokenizer
    ids = tokenizer.encode(f"{CAT} 漢字 ;")
    for text in (tokenizer.decode(ids), tokenizer.decode(ids)[:-4]):
        parts = list(pieces(tokenizer, Answer(text, ids, [-1.0] * len(ids), 0.0)))
        assert "".join(part for part, _ in parts) == text and len(parts) == len(ids) and parts[0][0] == "<loc0256>"


def test_overlap():
    assert box_iou((0, 0, 2, 2), (1, 0, 3, 2)) == pytest.approx(1 / 3) and box_iou((0, 0, 1, 1), (1, 1, 2, 2)) == 0 == box_iou(
        (0, 0, 0, 0), (0, 0, 0, 0)
    )


def test_detect():
    tiny = pg.load("tiny")
    things = tiny.detect(PHOTO, "3")
    assert isinstance(things, Detections) and [thing.label for thing in things] == ["3", "3"] and not things.skipped
    for thing, box in zip(things, [(89, 9, 248, 191), (511, 294, 624, 439)]):
        assert box_iou(thing.box, box) > 0.75 and thing.score is not None and 0.1 < thing.score <= 1
    assert tiny.detections(location_text(things, (640, 480)), PHOTO)[0].score is None
    with pytest.raises(ValueError, match="no image file"):
        tiny.detect("nothing.png", "3")


def test_drawing():
    """The edges, the mask and the label have the label's colour; the rest stays, and so does the image that was given."""
    image = Image.new("RGB", (200, 100), "white")
    mask = np.zeros((100, 200), bool)
    mask[60:80, 120:150] = True
    picture = draw(image, [Detection("one", (20, 40, 80, 90), 0.5), Detection("two", (110, 50, 160, 90), mask=mask)])
    red, green = (tuple(bytes.fromhex(color[1:])) for color in COLORS[:2])
    at = lambda *place: picture.getpixel(place)
    assert at(20, 60) == red and at(50, 90) == red and at(110, 60) == green and at(50, 60) == (255, 255, 255) == at(115, 55)
    assert at(130, 70) == tuple(round(255 + (c - 255) * 115 / 255) for c in green)
    assert at(21, 39) == red and image.getcolors() == [(20000, (255, 255, 255))]
    everywhere = draw(image, [Detection("a very long label that fits nowhere at all", (150, 0, 200, 5)), Detection("", (0, 0, 1, 1))])
    assert everywhere.size == (200, 100)


def test_masks_are_pasted_to_the_part_of_a_pixel():
    half = np.where(np.arange(64)[:, None] < 32, 1.0, -1.0) * np.ones((64, 64))
    found = paste(half, (10, 20, 30, 60), (50, 100))
    expected = np.zeros((100, 50), bool)
    expected[20:40, 10:30] = True
    np.testing.assert_array_equal(found, expected)
    assert paste(np.ones((64, 64)), (10.4, 20.4, 11.4, 22.6), (50, 100)).sum() == 3  # one column, three rows have their centres inside
    assert paste(np.ones((64, 64)), (0, 0, 50, 100), (50, 100)).all()


def test_command(command, tmp_path):
    file = tmp_path / "boxes.png"
    code, out, err = command("generate", "--image", PHOTO, "--prompt", "detect 3", "ocr", "detect 4", "--draw", file)
    assert code == 0 and out.count("<loc") == 12 and err.count("\n") == 1 and "boxes.png shows nothing for '" in err
    drawn, plain = (np.asarray(Image.open(path).convert("RGB"), int) for path in (file, PHOTO))
    for color in COLORS[:2]:  # of 3 and of 4
        assert (drawn == tuple(bytes.fromhex(color[1:]))).all(-1).sum() > 500
    assert (drawn == plain).all(-1).mean() > 0.9 and sorted(tmp_path.iterdir()) == [file]


def test_command_with_several_images(command, tmp_path):
    other = tmp_path / "other.jpg"
    Image.open(PHOTO).save(other)
    code, _, _ = command("generate", "--image", PHOTO, other, "--prompt", "detect 4", "--draw", tmp_path / "boxes.jpg")
    assert code == 0 and {path.name for path in tmp_path.iterdir()} == {"other.jpg", "boxes-1.jpg", "boxes-2.jpg"}


@pytest.mark.parametrize("arguments, told", [
    (("--prompt", "detect 4", "--draw", "boxes.xyz"), r"no picture can be written as .xyz"),
    (("--prompt", "detect 4", "--draw", "boxes"), "a file without a suffix"),
    (("--prompt", "detect 4", "--draw", "nowhere/boxes.png"), "no directory nowhere"),
    ((str(PHOTO), "--prompt", "<image><image> detect 4", "--draw", "boxes.png"), "one at a time"),
])  # fmt: skip
def test_command_errors(command, tmp_path, monkeypatch, arguments, told):
    monkeypatch.chdir(tmp_path)
    code, out, err = command("generate", "--image", PHOTO, *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1) and told in err and not list(tmp_path.iterdir())
