"""Duplicates are dropped, and the boxes of several views become one."""

from __future__ import annotations

import pytest

from paligemma_jax.processing.fuse import fuse, suppress
from paligemma_jax.processing.locations import Detection, Detections

BOX = (10.0, 10.0, 30.0, 30.0)
NEAR = (11.0, 10.0, 31.0, 30.0)
FAR = (60.0, 60.0, 90.0, 90.0)


def cat(box, score=None):
    return Detection("cat", box, score)


def test_a_worse_duplicate_is_dropped():
    found = Detections([cat(NEAR, 0.4), cat(BOX, 0.9), cat(FAR, 0.1)], ["rest"])
    kept = suppress(found, 0.5)
    assert kept == [cat(BOX, 0.9), cat(FAR, 0.1)] and kept.skipped == ["rest"]


def test_other_labels_and_smaller_overlaps_are_no_duplicates():
    dog = Detection("dog", NEAR, 0.4)
    assert suppress(Detections([cat(BOX, 0.9), dog]), 0.5) == [cat(BOX, 0.9), dog]
    assert len(suppress(Detections([cat(BOX, 0.9), cat(NEAR, 0.4)]), 0.95)) == 2


def test_without_scores_the_first_is_kept():
    assert suppress(Detections([cat(BOX), cat(NEAR)]), 0.5) == [cat(BOX)]
    assert len(suppress(Detections([cat(BOX), cat(BOX)]), 0)) == 1


def test_an_object_has_the_median_of_its_boxes():
    """One view that misses an edge does not move it, as the mean would."""
    views = [[cat(BOX, 0.5)], [cat(BOX, 0.5)], [cat((10.0, 10.0, 30.0, 36.0), 0.5)]]
    (fused,) = fuse([Detections(view) for view in views])
    assert fused.box == BOX and fused.label == "cat"


def test_the_score_is_the_share_of_views():
    views = [[cat(BOX, 0.5), cat(FAR, 0.9)], [cat(NEAR, 0.5)], [cat(BOX, 0.5)], [cat(BOX, 0.5)]]
    first, second = fuse([Detections(view) for view in views])
    assert first.score == pytest.approx(1, abs=0.01) and first.score < 1
    assert second.box == FAR and second.score == pytest.approx(0.25, abs=0.01)


def test_among_equal_shares_the_scores_rank():
    better, worse = fuse([Detections([cat(BOX, 0.9), cat(FAR, 0.3)])])
    assert better.score > worse.score


def test_two_boxes_of_a_view_are_two_objects():
    """Otherwise two near objects would be one."""
    views = [Detections([cat(BOX, 0.9), cat(NEAR, 0.8)])] * 3
    assert len(fuse(views)) == 2


def test_labels_are_apart():
    views = [Detections([cat(BOX, 0.9)]), Detections([Detection("dog", BOX, 0.9)])]
    assert [d.label for d in fuse(views)] == ["cat", "dog"]
