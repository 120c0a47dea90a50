"""Metrics of boxes and masks. A box is y0, x0, y1, x1 in any unit.

Axes: N images, D detected objects, R reference objects, T thresholds.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Protocol

import numpy as np

from paligemma_jax.metrics.scores import Metric, Scores, mean_fraction
from paligemma_jax.processing.locations import score_of

THRESHOLDS = np.linspace(0.5, 0.95, 10)  # IoU
RECALLS = np.linspace(0, 1, 101)
MAX_DETECTIONS = 100  # per label and image

Box = Sequence[float]


class LabelledBox(Protocol):
    """A detected object or a reference object."""

    @property
    def label(self) -> str: ...

    @property
    def box(self) -> Box: ...

    @property
    def score(self) -> float | None: ...


Objects = Sequence[Sequence[LabelledBox]]  # of each image


def overlaps(a: Sequence[Box], b: Sequence[Box]) -> np.ndarray:
    """float64[D, R]: intersection over union of each box of `a` with each of `b`."""
    first, second = np.reshape(a, (-1, 1, 4)).astype(float), np.reshape(b, (1, -1, 4)).astype(float)
    low = np.maximum(first[..., :2], second[..., :2])
    high = np.minimum(first[..., 2:], second[..., 2:])
    intersection = np.prod(np.maximum(high - low, 0), axis=-1)
    return intersection / np.maximum(_area(first) + _area(second) - intersection, 1e-12)


def _area(boxes: np.ndarray) -> np.ndarray:
    return np.prod(np.maximum(boxes[..., 2:] - boxes[..., :2], 0), axis=-1)


def _hits(
    detections: Sequence[LabelledBox], references: Sequence[LabelledBox], thresholds: np.ndarray
) -> np.ndarray:
    """bool[T, D]: whether each detection, best score first, matches an unmatched reference."""
    table = overlaps([item.box for item in detections], [item.box for item in references])
    hits = np.zeros((len(thresholds), len(detections)), bool)
    for hit, threshold in zip(hits, thresholds, strict=True):
        free = np.ones(len(references), bool)
        for d, ious in enumerate(table):
            candidates = np.where(free & (ious >= min(threshold, 1 - 1e-10)), ious, -1)
            if candidates.max(initial=-1) >= 0:
                # The last of equal IoUs, as in pycocotools.
                free[len(candidates) - 1 - candidates[::-1].argmax()] = False
                hit[d] = True
    return hits


def matches(
    detections: Sequence[LabelledBox], references: Sequence[LabelledBox], threshold: float = 0.5
) -> list[tuple[float, bool]]:
    """The score of each detection of an image, and whether it matches a reference of its label."""
    pairs = []
    for label in dict.fromkeys(item.label for item in detections):
        found = sorted(
            (item for item in detections if item.label == label), key=score_of, reverse=True
        )
        objects = [item for item in references if item.label == label]
        (hits,) = _hits(found, objects, np.array([threshold]))
        pairs += zip(map(score_of, found), hits.tolist(), strict=True)
    return pairs


def _average_precision(predictions: Objects, references: Objects, thresholds: np.ndarray) -> Scores:
    tables, matched = [], np.zeros(len(references))
    for label in sorted({item.label for objects in references for item in objects}):
        scores, images, hits = [], [], []
        counts = np.zeros(len(references))
        for i, (detections, objects) in enumerate(zip(predictions, references, strict=True)):
            detections = [item for item in detections if item.label == label]
            detections = sorted(detections, key=score_of, reverse=True)[:MAX_DETECTIONS]
            objects = [item for item in objects if item.label == label]
            counts[i] = len(objects)
            hits.append(_hits(detections, objects, thresholds))
            matched[i] += hits[-1].sum() / len(thresholds)
            scores += map(score_of, detections)
            images += [i] * len(detections)
        order = np.argsort(-np.array(scores, float), kind="stable")
        hits = np.concatenate(hits, axis=1)[:, order]
        tables.append((counts, np.array(images, int)[order], hits))

    def total(weights: np.ndarray) -> float:
        precisions = [
            _mean_precision(weights @ counts, weights[images], hits)
            for counts, images, hits in tables
            if weights @ counts
        ]
        return float(np.mean(precisions)) if precisions else float("nan")

    sizes = np.array([len(a) + len(b) for a, b in zip(predictions, references, strict=True)])
    f1 = np.where(sizes > 0, 2 * matched / np.maximum(sizes, 1), 1.0)
    return Scores(f1, total, sizes > 0)


def _mean_precision(positives: float, weights: np.ndarray, hits: np.ndarray) -> float:
    """The best precision at each recall or above, averaged over RECALLS and thresholds.

    Args:
        positives: Number of reference objects.
        weights: float[D], how often each detection occurs, best score first.
        hits: bool[T, D].
    """
    true, false = np.cumsum(weights * hits, axis=1), np.cumsum(weights * ~hits, axis=1)
    precision = true / np.maximum(true + false, 1e-12)
    best = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    best = np.pad(best, ((0, 0), (0, 1)))  # 0 where the recall is not reached
    recalls = true / positives
    rows = zip(best, recalls, strict=True)
    return float(np.mean([row[np.searchsorted(recall, RECALLS)] for row, recall in rows]))


@partial(Metric, title="AP", case_title="F1 of boxes at 0.5 to 0.95", compares="detections")
def average_precision(predictions: Objects, references: Objects) -> Scores:
    """COCO's AP, averaged over labels and over IoU thresholds of 0.5, 0.55, ..., 0.95.

    Computed as in pycocotools (all areas, 100 detections, no crowds). A detection without a score
    counts as one of score 1; scores of references are ignored. A label without references does not
    count; without any reference, AP is nan. A single image is scored by the F1 of its boxes, which
    ignores scores, and is 1 if there is nothing to detect and nothing was detected.
    """
    return _average_precision(predictions, references, THRESHOLDS)


@partial(Metric, title="AP50", case_title="at 0.5", compares="detections")
def ap50(predictions: Objects, references: Objects) -> Scores:
    """COCO's AP50: AP at an IoU threshold of 0.5."""
    return _average_precision(predictions, references, THRESHOLDS[:1])


@partial(Metric, title="AP75", case_title="at 0.75", compares="detections")
def ap75(predictions: Objects, references: Objects) -> Scores:
    """COCO's AP75: AP at an IoU threshold of 0.75."""
    return _average_precision(predictions, references, THRESHOLDS[5:6])


@partial(Metric, title="word F1 at 0.5", compares="detections")
def word_f1(predictions: Objects, references: Objects) -> Scores:
    """The F1 of words read with their places: a word is right if its text equals that of a
    reference whose box it overlaps with an IoU of at least 0.5.

    This is end-to-end word spotting of the HierText protocol (arXiv:2203.15143) on boxes that are
    parallel to the image; the published one compares polygons, and ignores illegible words. Words
    of all images count together. The label of a box is its word, and case counts.
    """
    pairs = zip(predictions, references, strict=True)
    hits = np.array([sum(hit for _, hit in matches(*pair)) for pair in pairs], float)
    sizes = np.array([len(a) + len(b) for a, b in zip(predictions, references, strict=True)], float)

    def total(weights: np.ndarray) -> float:
        return float(2 * weights @ hits / max(weights @ sizes, 1))

    return Scores(np.where(sizes > 0, 2 * hits / np.maximum(sizes, 1), 1.0), total, sizes > 0)


# ---- RefCOCO: one object per case; the prediction is None if the answer has none


def _iou(prediction: Box | None, reference: Box) -> float:
    return 0.0 if prediction is None else float(overlaps([prediction], [reference])[0, 0])


@partial(Metric, title="box accuracy at 0.5", compares="box")
def box_accuracy(predictions: Sequence[Box | None], references: Sequence[Box]) -> Scores:
    """The fraction of boxes whose IoU with the reference is at least 0.5."""
    pairs = zip(predictions, references, strict=True)
    return mean_fraction(_iou(*pair) >= 0.5 for pair in pairs)


@partial(Metric, title="box mIoU", compares="box")
def box_iou(predictions: Sequence[Box | None], references: Sequence[Box]) -> Scores:
    """The mean IoU of the boxes."""
    return mean_fraction(map(_iou, predictions, references))


@partial(Metric, title="mask mIoU", compares="mask")
def mask_iou(predictions: Sequence[np.ndarray | None], references: Sequence[np.ndarray]) -> Scores:
    """RefCOCO's mIoU: the mean IoU of masks bool[H, W]; 0 for None (big_vision's evaluator)."""
    return mean_fraction(map(_mask_iou, predictions, references))


def _mask_iou(prediction: np.ndarray | None, reference: np.ndarray) -> float:
    if prediction is None:
        return 0.0
    if prediction.shape != reference.shape:
        raise ValueError(
            f"masks must have the shape of the reference, {reference.shape}, got {prediction.shape}"
        )
    return float((prediction & reference).sum() / max((prediction | reference).sum(), 1))
