"""Rewards against cases made by hand and against the metrics of the project."""

from __future__ import annotations

import numpy as np
import pytest

from paligemma_jax.data.rows import make_example
from paligemma_jax.metrics.registry import METRICS
from paligemma_jax.processing.locations import box_iou, parse_detections
from paligemma_jax.reinforcement.rewards import REWARDS, resolve_reward, score_answer

LEFT = "<loc0000><loc0000><loc0500><loc0400> cat"
RIGHT = "<loc0100><loc0600><loc0900><loc1000> cat"
HALF = "<loc0000><loc0000><loc0250><loc0400> cat"  # IoU 0.5 with LEFT
NEAR = "<loc0000><loc0000><loc0500><loc0430> cat"  # IoU 0.93 with LEFT


def example(suffix="", prefix="detect cat", **fields):
    row = {"image": np.zeros((8, 8, 3), np.uint8), "prefix": prefix, "suffix": suffix, **fields}
    return make_example(row, 3)


@pytest.mark.parametrize(
    "name, answer, suffix, expected",
    [
        ("exact", " 42\n", "42", 1),
        ("exact", "421", "42", 0),
        ("anls", "hallo", "hello", 0.8),
        ("anls", "no", "hello", 0),
        ("box_ap", LEFT, LEFT, 1),
        ("box_ap", NEAR, LEFT, 0.9),  # a hit at 0.5 to 0.9, not at 0.95
        ("box_ap", HALF, LEFT, 0.1),
        ("box_ap", f"{LEFT} ; {RIGHT}", LEFT, 2 / 3),
        ("box_ap", LEFT, f"{LEFT} ; {RIGHT}", 2 / 3),
        ("box_ap", LEFT.replace("cat", "dog"), LEFT, 0),
        ("box_ap", "", "", 1),
        ("box_ap", LEFT, "", 0),
        ("iou", LEFT, LEFT, 1),
        ("iou", NEAR, LEFT, 400 / 430),
        ("iou", HALF, LEFT, 0.5),
        ("iou", f"{RIGHT} ; {HALF}", f"{LEFT} ; {RIGHT}", 0.75),  # in any order
        ("iou", f"{LEFT} ; {LEFT}", LEFT, 0.5),  # a box matches once
        ("iou", LEFT.replace("cat", "dog"), LEFT, 0),
        ("iou", "", LEFT, 0),
        ("iou", "", "", 1),
        ("format", f"{LEFT} ; {RIGHT}", "", 1),
        ("format", "", LEFT, 1),
        ("format", "<loc0000><loc0000><loc0500> cat", LEFT, 0),
        ("format", f"{LEFT} ; and more", LEFT, 0),
        ("format", LEFT.replace("cat", "dog"), LEFT, 0),
    ],
)
def test_rewards_of_cases_made_by_hand(name, answer, suffix, expected):
    assert score_answer(REWARDS[name], answer, example(suffix)) == pytest.approx(expected)


def random_boxes(rng):
    corners = np.sort(rng.integers(0, 1024, (rng.integers(0, 4), 2, 2)), axis=1)
    corners[:, 1] += corners[:, 0] == corners[:, 1]  # an area
    boxes = np.minimum(corners, 1023).reshape(-1, 4)
    return " ; ".join("".join(f"<loc{n:04}>" for n in box) + " cat" for box in boxes)


def test_rewards_are_the_metrics_of_single_answers():
    rng = np.random.default_rng(0)
    for _ in range(50):
        answer, suffix = random_boxes(rng), random_boxes(rng)
        found, expected = (parse_detections(text, (640, 480)) for text in (answer, suffix))
        f1 = METRICS["average_precision"].scores([found], [expected]).each[0]
        assert score_answer(REWARDS["box_ap"], answer, example(suffix)) == pytest.approx(f1)
        if len(found) == len(expected) == 1:
            overlap = box_iou(found[0].box, expected[0].box)
            assert score_answer(REWARDS["iou"], answer, example(suffix)) == pytest.approx(overlap)


def test_texts_are_compared_with_all_answers():
    row = example("two", prefix="answer en how many?", answers=["two", "2"])
    assert score_answer(REWARDS["exact"], "2", row) == 1
    assert score_answer(REWARDS["anls"], "Two", row) == 1


def test_a_plain_function_is_a_reward():
    def short(answer, example):
        return 1 / (1 + len(answer))

    assert score_answer(resolve_reward(short), "abc", example()) == 0.25


@pytest.mark.parametrize(
    "name, row, message",
    [
        ("box_ap", example("three cats"), "row 3: rewards of boxes require a suffix of boxes"),
        ("iou", example("cat"), "row 3: rewards of boxes require a suffix of boxes"),
        ("format", example(LEFT, "ocr"), "row 3: reward format requires the prompt to be detect"),
    ],
)
def test_a_row_without_what_a_reward_needs_is_an_error(name, row, message):
    with pytest.raises(ValueError, match=message):
        score_answer(REWARDS[name], LEFT, row)


def test_an_unknown_reward_is_an_error_with_a_close_name():
    with pytest.raises(ValueError, match=r"got box_app \(did you mean box_ap\?\)"):
        resolve_reward("box_app")


@pytest.mark.parametrize("value", [None, "good", float("nan"), [1, 2]])
def test_a_reward_must_be_a_finite_number(value):
    with pytest.raises(ValueError, match="row 3: a reward must be a finite number, got"):
        score_answer(lambda answer, example: value, "", example())
