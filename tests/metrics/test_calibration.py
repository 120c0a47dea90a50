"""The calibration error of boxes, on worked examples and against another computation."""

from __future__ import annotations

import numpy as np
import pytest

from paligemma_jax.metrics.registry import METRICS
from paligemma_jax.processing.locations import Detection

error = METRICS["box_calibration"]
RIGHT, WRONG = (0.0, 0.0, 10.0, 10.0), (50.0, 50.0, 60.0, 60.0)


def boxes(*pairs):
    return [Detection("a", box, score) for box, score in pairs]


def test_worked_examples():
    reference = [boxes((RIGHT, None))]
    assert error([boxes((RIGHT, 0.85))], reference) == pytest.approx(0.15)
    # In one bin, 0.85 + 0.85 of 1 right box.
    assert error([boxes((RIGHT, 0.85), (WRONG, 0.85))], reference) == pytest.approx(0.35)
    # In two bins, 0.15 and 0.25.
    assert error([boxes((RIGHT, 0.85), (WRONG, 0.25))], reference) == pytest.approx(0.2)
    # The second box of an object is wrong, and so is another label.
    assert error([boxes((RIGHT, 0.9), (RIGHT, 0.85))], reference) == pytest.approx(0.375)
    assert error([[Detection("b", RIGHT, 0.5)]], reference) == pytest.approx(0.5)
    assert np.isnan(error([[]], reference))


def test_scores_that_are_probabilities_have_no_error():
    rng = np.random.default_rng(0)
    scores = rng.uniform(size=20_000)
    right = rng.uniform(size=20_000) < scores
    predictions = [boxes((RIGHT if r else WRONG, s)) for r, s in zip(right, scores, strict=True)]
    references = [boxes((RIGHT, None))] * len(scores)
    assert error(predictions, references) < 0.02
    expected = 0.0
    for low in range(10):
        chosen = (scores > low / 10) & (scores <= (low + 1) / 10)
        expected += chosen.mean() * abs(scores[chosen].mean() - right[chosen].mean())
    assert error(predictions, references) == pytest.approx(expected, abs=1e-9)


def test_words_are_right_with_their_text_and_place():
    words = METRICS["word_f1"]
    reference = [[Detection("Stop", RIGHT), Detection("sign", WRONG)]]
    assert words([[Detection("Stop", RIGHT, 0.5), Detection("sign", WRONG, 0.5)]], reference) == 1
    assert words([[Detection("stop", RIGHT, 0.5), Detection("sign", WRONG, 0.5)]], reference) == 0.5
    assert words([[Detection("Stop", RIGHT, 0.5)]], reference) == pytest.approx(2 / 3)
    # Words of all images count together.
    both = words([[Detection("Stop", RIGHT)], []], [reference[0], [Detection("a", RIGHT)]])
    assert both == pytest.approx(2 * 1 / 4)
