"""The scenes that the embedded checkpoint is trained and evaluated on."""

import numpy as np
import pytest

from paligemma_jax.processing.locations import box_iou
from paligemma_jax.tiny.digits import glyphs, with_codes
from paligemma_jax.tiny.scenes import MAX_DIGITS, SIZE, compose

pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def scenes():
    return compose(np.random.default_rng(0), glyphs(held_out=True), 200)


def test_scenes_are_the_same_for_the_same_seed(scenes):
    again, different = (
        compose(np.random.default_rng(seed), glyphs(held_out=True), 200) for seed in (0, 1)
    )
    np.testing.assert_array_equal(scenes.images, again.images)
    np.testing.assert_array_equal(scenes.boxes, again.boxes)
    assert (scenes.images != different.images).any()


def test_digits_stand_apart_in_reading_order_and_inside(scenes):
    for labels, boxes in zip(scenes.labels, scenes.boxes, strict=True):
        count = (labels >= 0).sum()
        assert 1 <= count <= MAX_DIGITS and (labels[count:] == -1).all()
        boxes = boxes[:count]
        assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] <= SIZE).all()
        assert (boxes[:, :2] < boxes[:, 2:]).all()
        assert (np.diff(boxes[:, 1] + boxes[:, 3]) >= 0.08 * SIZE).all()
        assert all(box_iou(boxes[i], boxes[j]) == 0 for i in range(count) for j in range(i))
    assert np.bincount((scenes.labels >= 0).sum(1), minlength=5)[1:].min() > 25


@pytest.mark.parametrize("canvas", [(112, 112), (120, 200)])
def test_boxes_contain_the_ink_and_touch_it_on_every_side(canvas):
    """The canvas is not square, so that swapped axes show. Digits are black on plain white, so that
    all dark pixels are ink."""
    rng = np.random.default_rng(0)
    scenes = compose(rng, glyphs(held_out=True), 30, canvas, variety=0)
    assert scenes.images.shape[1:] == (*canvas, 3)
    for image, labels, boxes in zip(scenes.images, scenes.labels, scenes.boxes, strict=True):
        ink = image.min(-1) < 225
        for y0, x0, y1, x1 in boxes[labels >= 0]:
            inside = ink[y0:y1, x0:x1]
            rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
            assert rows[0] <= 2 and rows[-1] >= y1 - y0 - 3
            assert columns[0] <= 2 and columns[-1] >= x1 - x0 - 3
            ink[y0:y1, x0:x1] = False
        assert not ink.any()


def test_ink_differs_from_its_background(scenes):
    for image, labels, boxes in zip(scenes.images, scenes.labels, scenes.boxes, strict=True):
        for y0, x0, y1, x1 in boxes[labels >= 0]:
            low, high = np.percentile(image[y0:y1, x0:x1].mean(-1), [3, 97])
            assert high - low > 40


def test_masks_are_the_ink():
    """On a canvas that is not square."""
    source = with_codes(glyphs(held_out=True))
    scenes = compose(np.random.default_rng(0), source, 30, (120, 200), variety=0)
    assert scenes.masks is not None and scenes.masks.shape == (30, 4, 120, 200)
    grey = scenes.images[..., 0]
    clear = grey != 127  # half ink, rounded down
    np.testing.assert_array_equal(scenes.masks.any(1)[clear], grey[clear] < 127)
