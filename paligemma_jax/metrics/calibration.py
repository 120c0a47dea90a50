"""Whether the scores of boxes are probabilities."""

from __future__ import annotations

from functools import partial

import numpy as np

from paligemma_jax.metrics.boxes import Objects, matches
from paligemma_jax.metrics.scores import Metric, Scores

BINS = 10


@partial(
    Metric,
    title="calibration error of boxes",
    case_title="score minus hit",
    compares="detections",
    better="lower",
)
def box_calibration(predictions: Objects, references: Objects) -> Scores:
    """The expected calibration error (arXiv:1706.04599) of the scores of boxes, in ten bins.

    A box is right if it matches a reference of its label at an IoU of 0.5, as in AP50. In each bin
    of scores, (0, 0.1], (0.1, 0.2], ..., the mean score is compared with the share of boxes that
    are right; bins count by their boxes. A box without a score counts as one of score 1. Without
    any box the error is nan. A single image is scored by its mean of |score - right|.
    """
    images, scores, right = [], [], []
    for i, pair in enumerate(zip(predictions, references, strict=True)):
        for score, hit in matches(*pair):
            images.append(i)
            scores.append(score)
            right.append(hit)
    owners, values, hits = np.array(images, int), np.array(scores, float), np.array(right, float)
    bins = np.clip(np.ceil(values * BINS).astype(int) - 1, 0, BINS - 1)

    def total(weights: np.ndarray) -> float:
        counts = weights[owners]
        if not counts.sum():
            return float("nan")
        gaps = np.bincount(bins, counts * (values - hits), BINS)
        return float(np.abs(gaps).sum() / counts.sum())

    boxes = np.bincount(owners, minlength=len(predictions))
    errors = np.bincount(owners, np.abs(values - hits), len(predictions))
    return Scores(errors / np.maximum(boxes, 1), total)
