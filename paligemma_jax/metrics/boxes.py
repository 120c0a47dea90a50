"""Metrics of boxes and masks. A box is y0, x0, y1, x1 in any unit: stretching a picture changes no overlap.

Axes: N pictures, D objects found, R right ones, T thresholds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from paligemma_jax.metrics.scores import Metric, Scores, mean

THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0, 1, 101)
MOST = 100  # found objects that count, of one label in one picture


class Thing(Protocol):
    """An object of a picture."""

    @property
    def label(self) -> str: ...

    @property
    def box(self) -> Sequence[float]: ...

    @property
    def score(self) -> float | None: ...


Pictures = Sequence[Sequence[Thing]]


def overlaps(a: Sequence[Sequence[float]], b: Sequence[Sequence[float]]) -> np.ndarray:
    """float64[D, R]: intersection over union of each box of `a` with each of `b`."""
    one, other = np.reshape(np.asarray(a, float), (-1, 1, 4)), np.reshape(np.asarray(b, float), (1, -1, 4))
    area = lambda box: np.prod(np.maximum(box[..., 2:] - box[..., :2], 0), axis=-1)
    both = area(np.concatenate([np.maximum(one[..., :2], other[..., :2]), np.minimum(one[..., 2:], other[..., 2:])], axis=-1))
    return both / np.maximum(area(one) + area(other) - both, 1e-12)


def _sure(thing: Thing) -> float:
    return 1.0 if thing.score is None else thing.score


def _hits(found: Sequence[Thing], right: Sequence[Thing], thresholds: np.ndarray) -> np.ndarray:
    """bool[T, D]: whether each found object, best score first, is one that was right and free."""
    table = overlaps([thing.box for thing in found], [thing.box for thing in right])
    hits = np.zeros((len(thresholds), len(found)), bool)
    for hit, threshold in zip(hits, thresholds):
        free = np.ones(len(right), bool)
        for d, row in enumerate(table):
            fits = np.where(free & (row >= min(threshold, 1 - 1e-10)), row, -1)
            if fits.max(initial=-1) >= 0:
                free[len(fits) - 1 - fits[::-1].argmax()] = False  # of several alike the last, as pycocotools does
                hit[d] = True
    return hits


def _average_precision(predictions: Pictures, references: Pictures, thresholds: np.ndarray) -> Scores:
    labels = sorted({thing.label for right in references for thing in right})
    tables, agreed = [], np.zeros(len(references))
    for label in labels:
        scores, cases, hits = [], [], []
        rights = np.array([sum(thing.label == label for thing in right) for right in references], float)
        for i, (things, right) in enumerate(zip(predictions, references)):
            found = sorted((thing for thing in things if thing.label == label), key=lambda thing: -_sure(thing))[:MOST]
            hits.append(_hits(found, [thing for thing in right if thing.label == label], thresholds))
            scores += map(_sure, found)
            cases += [i] * len(found)
            agreed[i] += hits[-1].sum() / len(thresholds)
        order = np.argsort(-np.array(scores, float), kind="stable")
        tables.append((rights, np.array(cases, int)[order], np.concatenate(hits, axis=1)[:, order]))

    def total(weights: np.ndarray) -> float:
        known = [_area(weights @ rights, weights[cases], hits) for rights, cases, hits in tables if weights @ rights]
        return float(np.mean(known)) if known else float("nan")

    sizes = np.array([len(things) + len(right) for things, right in zip(predictions, references)])
    return Scores(np.where(sizes > 0, 2 * agreed / np.maximum(sizes, 1), 1.0), total)


def _area(rights: float, weights: np.ndarray, hits: np.ndarray) -> float:
    """The mean over thresholds and RECALLS of the best precision from that recall on. weights float[D], hits bool[T, D], best score first."""
    true, false = np.cumsum(weights * hits, axis=1), np.cumsum(weights * ~hits, axis=1)
    precision = true / np.maximum(true + false, 1e-12)
    best = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    padded = np.pad(best, ((0, 0), (0, 1)))
    return float(np.mean([row[np.searchsorted(recall, RECALLS)] for row, recall in zip(padded, true / rights)]))


@Metric
def average_precision(predictions: Pictures, references: Pictures) -> Scores:
    """COCO's AP: over labels, and over overlaps of 0.5, 0.55, ... 0.95, as pycocotools computes it (all areas, 100 objects, no crowds).

    predictions and references: for each picture the objects found, and those that are there, whose score plays no part. A label that nowhere
    is right counts for nothing; nan if no object is. `each` is the F1 of a picture, whatever the scores; 1 where nothing was to be found, and
    nothing was. An object without a score counts as one of score 1.
    """
    return _average_precision(predictions, references, THRESHOLDS)


@Metric
def ap50(predictions: Pictures, references: Pictures) -> Scores:
    """COCO's AP50: at an overlap of 0.5."""
    return _average_precision(predictions, references, THRESHOLDS[:1])


@Metric
def ap75(predictions: Pictures, references: Pictures) -> Scores:
    """COCO's AP75."""
    return _average_precision(predictions, references, THRESHOLDS[5:6])


# ---- RefCOCO: one object a case; None where nothing could be read from an answer


def _overlap(found: Sequence[float] | None, right: Sequence[float]) -> float:
    return 0.0 if found is None else float(overlaps([found], [right])[0, 0])


@Metric
def box_accuracy(predictions: Sequence[Sequence[float] | None], references: Sequence[Sequence[float]]) -> Scores:
    """The share of boxes that overlap the right one by at least 0.5."""
    return mean(_overlap(found, right) >= 0.5 for found, right in zip(predictions, references))


@Metric
def box_iou(predictions: Sequence[Sequence[float] | None], references: Sequence[Sequence[float]]) -> Scores:
    """The mean overlap of the boxes."""
    return mean(map(_overlap, predictions, references))


@Metric
def mask_iou(predictions: Sequence[np.ndarray | None], references: Sequence[np.ndarray]) -> Scores:
    """RefCOCO's mIoU: the mean over cases of intersection over union, in pixels; bool[H, W] each. 0 for None (big_vision's evaluator)."""

    def score(found: np.ndarray | None, right: np.ndarray) -> float:
        if found is None:
            return 0.0
        if found.shape != right.shape:
            raise ValueError(f"a mask of {found.shape} pixels for a picture of {right.shape}")
        return float((found & right).sum() / max((found | right).sum(), 1))

    return mean(map(score, predictions, references))
