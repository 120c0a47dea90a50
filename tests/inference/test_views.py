"""Boxes from several views of an image, on the embedded model."""

from __future__ import annotations

import json
from unittest import mock

import numpy as np
import pytest
from PIL import Image

import paligemma_jax as pg
from paligemma_jax.checkpoints.source import TINY
from paligemma_jax.inference import views
from paligemma_jax.inference.options import DecodingOptions
from paligemma_jax.inference.views import BoxOptions
from paligemma_jax.metrics.registry import METRICS
from paligemma_jax.processing.locations import Detection
from paligemma_jax.tiny.dataset import write_digits

PHOTO = str(TINY.parent / "digits.jpg")


@pytest.fixture(scope="module")
def tiny():
    return pg.load("tiny")


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return write_digits(str(tmp_path_factory.mktemp("digits")), ("detect",), 40) / "detect.jsonl"


@pytest.mark.parametrize("x,y", [(3, 0), (-2, 5), (0, -1)])
def test_a_view_is_the_image_moved(x, y):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    moved = np.asarray(views.shifted(Image.fromarray(pixels), x, y))
    inner = pixels[5:-5, 5:-5]
    np.testing.assert_array_equal(moved[5 + y : 15 + y, 5 + x : 25 + x], inner)
    assert moved.shape == pixels.shape
    if x > 0:
        np.testing.assert_array_equal(moved[:, 0], moved[:, x])  # the edge is repeated


def test_more_views_are_more_exact(tiny, digits):
    """And their scores are probabilities."""
    rows = [json.loads(line) for line in digits.open()]
    images = [str(digits.parent / row["image"]) for row in rows]
    references = [
        [
            Detection(label, tuple(box))
            for label, box in zip(row["labels"], row["boxes"], strict=True)
        ]
        for row in rows
    ]
    ap, error = [], []
    for count in (1, 5):
        options = dict(boxes=BoxOptions(count), max_new_tokens=48)
        answers = tiny.answers(images, [row["prefix"] for row in rows], **options)
        found = [tiny.detections(*pair) for pair in zip(answers, images, strict=True)]
        ap.append(METRICS["average_precision"](found, references))
        error.append(METRICS["box_calibration"](found, references))
    assert ap[1] > ap[0] + 0.03 and ap[1] > 0.9
    assert error[1] < 0.1 < error[0]


def test_one_view_is_the_plain_answer(tiny):
    (plain,) = tiny.answers(PHOTO, "detect 3", 48)
    (same,) = tiny.answers(PHOTO, "detect 3", 48, boxes=BoxOptions(nms=1.0))
    assert same.text == plain.text
    scores = [[d.score for d in tiny.detections(a, PHOTO)] for a in (plain, same)]
    np.testing.assert_allclose(*scores, rtol=1e-6)


def test_answers_without_boxes_are_those_of_the_image(tiny, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    images, prompts = [PHOTO, broken, [PHOTO, PHOTO]], ["ocr"] * 3
    plain = tiny.answers(images, prompts, 12)
    same = tiny.answers(images, prompts, 12, boxes=BoxOptions(9))
    assert [(a.text, a.error) for a in same] == [(a.text, a.error) for a in plain]
    assert plain[1].error and plain[0].text


def test_boxes_stay_on_the_image(tiny):
    """Those at an edge, which a view moves across it, are clipped; masks are kept."""
    for detection in tiny.segment(PHOTO, "3", views=9, nms=0.5):
        left, top, right, bottom = detection.box
        assert 0 <= left < right <= 640 and 0 <= top < bottom <= 480
        assert detection.mask is not None and 0 < detection.score <= 1


def test_the_command_evaluates_views(command, digits, tmp_path):
    arguments = ["--data", digits, "--metric", "coco", "box_calibration", "--max-new-tokens", 48]
    code, output, _ = command("evaluate", *arguments, "--views", 5, "--output", tmp_path / "run")
    assert code == 0 and "AP: 9" in output and "calibration error" in output
    resumed = ("--views", 9, "--output", tmp_path / "run", "--resume")
    code, _, error = command("evaluate", *arguments, *resumed)
    assert code == 2 and "views" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "options,message",
    [(dict(views=3), "views must be 1, 5, 9, got 3"), (dict(nms=2), "nms must be an overlap from")],
)
def test_options_out_of_range(tiny, options, message):
    with pytest.raises(ValueError, match=message):
        tiny.detect(PHOTO, "3", **options)


def test_without_views_all_prompts_are_batched_together(tiny):
    """So many prompts go to an engine, and their answers come batch by batch."""
    prompts = tiny.processor.encode(PHOTO, [f"detect {i % 10}" for i in range(24)])
    options = DecodingOptions(max_new_tokens=16)
    with mock.patch.object(views, "answer_batches", side_effect=views.answer_batches) as spy:
        batches = list(tiny.batches(prompts, options, boxes=BoxOptions(nms=0.5), batch_size=4))
    assert spy.call_count == 1 and len(batches) > 1
    assert sorted(i for batch in batches for i in batch) == list(range(24))


def test_answers_are_fused_when_all_views_are_answered():
    batches = [{4: "e", 0: "a"}, {3: "d"}, {1: "b", 2: "c"}]
    groups = list(views._complete_groups(batches, [0, 0, 1, 2, 2]))
    assert groups == [{2: ["d", "e"]}, {0: ["a", "b"], 1: ["c"]}]
