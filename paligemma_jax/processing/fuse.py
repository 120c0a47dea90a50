"""Merge detections of one image: duplicates, and the boxes of several views."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from paligemma_jax.processing.locations import Detection, Detections, box_iou, score_of

RANKING = 0.01  # exponent of a score that only has to decide between equal shares
SAME = 0.5  # intersection over union from which two boxes of a label are of one object


def suppress(detections: Detections, iou: float) -> Detections:
    """Non-maximum suppression: drop a box that overlaps a better one of its label.

    Without scores, the earlier of two is the better one.

    Args:
        iou: Intersection over union above which two boxes overlap, from 0 to 1.
    """
    kept: list[Detection] = []
    for detection in sorted(detections, key=score_of, reverse=True):
        rivals = (other for other in kept if other.label == detection.label)
        if all(box_iou(other.box, detection.box) <= iou for other in rivals):
            kept.append(detection)
    return Detections(
        [d for d in detections if any(d is other for other in kept)], detections.skipped
    )


def fuse(views: Sequence[Detections], iou: float = SAME) -> Detections:
    """One box for each object that is detected in some of the views.

    Boxes of a label that overlap are of one object, at most one from each view. Its box has the
    median of each coordinate, which the few views that miss an edge do not move (the mean of
    Weighted Boxes Fusion, arXiv:1910.13302, they do). Its score is the share of the views that have
    it, which is close to the share of such boxes that are right; the scores of its boxes only rank
    objects of equal shares. Its mask codes are those of the best view.

    Args:
        views: Detections in the coordinates of one image.
        iou: Intersection over union from which two boxes are of one object.

    Returns:
        The objects, those of the first view first. `skipped` is that of all views.
    """
    objects: list[list[Detection]] = []
    for view in views:
        free = list(objects)  # without those that have a box of this view
        for detection in view:
            candidates = [(_overlap(members, detection), i) for i, members in enumerate(free)]
            overlap, best = max(candidates, default=(0.0, 0))
            if overlap >= iou:
                free.pop(best).append(detection)
            else:
                objects.append([detection])
    skipped = [part for view in views for part in view.skipped]
    return Detections([_merge(members, len(views)) for members in objects], skipped)


def _overlap(members: Sequence[Detection], detection: Detection) -> float:
    """Intersection over union with the mean of an object's boxes; 0 for another label."""
    if members[0].label != detection.label:
        return 0.0
    return box_iou(np.mean([member.box for member in members], axis=0).tolist(), detection.box)


def _merge(members: Sequence[Detection], views: int) -> Detection:
    left, top, right, bottom = np.median([member.box for member in members], axis=0).tolist()
    best = max(members, key=score_of)
    mean = sum(map(score_of, members)) / len(members)
    score = len(members) / views * mean**RANKING
    return replace(best, box=(left, top, right, bottom), score=score)
