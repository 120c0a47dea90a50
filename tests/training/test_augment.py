"""Augmented images, and the boxes in their text."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from paligemma_jax.checkpoints.source import resolve
from paligemma_jax.data.rows import Example
from paligemma_jax.inference.loading import make_processor
from paligemma_jax.processing.image import pixel_values
from paligemma_jax.processing.image_settings import ImageSettings
from paligemma_jax.training.augment import Augment, crop_box, move_boxes
from paligemma_jax.training.batches import Batcher, training_batch
from paligemma_jax.training.config import FinetuneConfig

SIZE = 256


def draw(boxes):
    """A black image with a white rectangle for each box (y0, x0, y1, x1 in pixels)."""
    array = np.zeros((SIZE, SIZE, 3), np.uint8)
    for y0, x0, y1, x1 in boxes:
        array[y0:y1, x0:x1] = 255
    return Image.fromarray(array)


def location_text(box):
    return "".join(f"<loc{value:04}>" for value in box)


def describe(boxes):
    """The answer that detects these boxes as "thing 0", "thing 1", ..."""
    bins = [[round(value / SIZE * 1023) for value in box] for box in boxes]
    return " ; ".join(f"{location_text(box)} thing {i}" for i, box in enumerate(bins))


def read_boxes(text):
    """Read the boxes of a text as fractions of the sides."""
    parts = [part for part in text.split(" ; ") if part]
    return [np.array([int(token[4:8]) for token in part.split(">")[:4]]) / 1023 for part in parts]


def make_example(boxes, prefix="detect thing", suffix=None):
    suffix = describe(boxes) if suffix is None else suffix
    return Example((draw(boxes),), prefix, suffix, 1.0, 1)


@pytest.mark.parametrize(
    "augment", [Augment(flip=1.0), Augment(crop=0.5), Augment(flip=0.5, crop=0.6, color=0.3)]
)
def test_boxes_match_the_augmented_image(augment):
    rng = np.random.default_rng(0)
    for _ in range(200):
        y0, x0 = rng.integers(0, 180, 2)
        box = (y0, x0, y0 + rng.integers(30, 76), x0 + rng.integers(30, 76))
        new = augment(make_example([box]), rng)
        bright = np.asarray(new.images[0])[..., 0] > 40
        rows, columns = np.flatnonzero(bright.any(1)), np.flatnonzero(bright.any(0))
        height, width = bright.shape
        start, end = (rows[0], columns[0]), (rows[-1] + 1, columns[-1] + 1)
        visible = np.array([*start, *end]) / [height, width, height, width]
        (box,) = read_boxes(new.suffix)
        np.testing.assert_allclose(box, visible, atol=2.5 / min(height, width))
        assert new.suffix.endswith(" thing 0")


def test_boxes_outside_the_crop_are_dropped():
    example = make_example([(0, 0, 40, 40), (200, 200, 250, 250)])
    rng, counts = np.random.default_rng(1), set()
    for _ in range(200):
        new = Augment(crop=0.4)(example, rng)
        boxes = read_boxes(new.suffix)
        counts.add(len(boxes))
        if new.images[0].size != (SIZE, SIZE) and len(boxes) == 1:
            assert new.suffix.count("thing") == 1
    assert counts == {1, 2}


@pytest.mark.parametrize("separator", [" ; ", "; ", ";"])
def test_dropping_a_box_keeps_the_separator(separator):
    things = {"cat": (10, 10, 200, 200), "dog": (800,) * 4, "cow": (0, 0, 99, 99)}
    text = separator.join(location_text(box) + label for label, box in things.items())
    window = np.array([0, 0, 0.5, 0.5])  # the dog is outside
    cat, cow = location_text((20, 20, 400, 400)), location_text((0, 0, 198, 198))
    expected = f"{cat}cat{separator}{cow}cow"
    assert move_boxes(text, lambda box: crop_box(box, window)) == expected


@pytest.mark.parametrize(
    "prefix,suffix",
    [
        ("detect the left cup", "<loc0000><loc0000><loc0400><loc0400> cup"),
        ("caption en", "a man on the Right"),
        ("segment cat", "<loc0001>" * 4 + "<seg001>" * 16),
    ],
)
def test_rows_with_sides_or_masks_are_not_mirrored(prefix, suffix):
    example = make_example([(0, 0, 40, 40)], prefix, suffix)
    new = Augment(flip=1.0)(example, np.random.default_rng(0))
    assert new.suffix == suffix
    np.testing.assert_array_equal(np.asarray(new.images[0]), np.asarray(example.images[0]))


def test_the_same_seed_gives_the_same_result():
    example, augment = make_example([(10, 10, 90, 90)]), Augment(0.5, 0.5, 0.5)
    first, second = (augment(example, np.random.default_rng((3, 4))) for _ in range(2))
    assert first.suffix == second.suffix
    np.testing.assert_array_equal(np.asarray(first.images[0]), np.asarray(second.images[0]))


def test_boxes_in_the_prompt_are_mirrored_and_prevent_cropping():
    example = make_example([], prefix=describe([(0, 0, 40, 64)]), suffix="a cup")
    new = Augment(flip=1.0, crop=0.5)(example, np.random.default_rng(0))
    assert new.prefix == "<loc0000><loc0767><loc0160><loc1023> thing 0"
    assert new.images[0].size == (SIZE, SIZE)


@pytest.mark.parametrize("on_white", [True, False])
def test_transparency_follows_the_image_settings(on_white):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 2, (20, 30, 3), np.uint8) * 255)
    image.info["transparency"] = (255, 0, 255)
    processor = make_processor(resolve("tiny"))
    processor = replace(processor, image_settings=ImageSettings(on_white=on_white))
    batcher = Batcher(processor, 1, None, range(1))
    rows = [Example((image,), "ocr", "1", 1.0, 0)]
    batch = training_batch(FinetuneConfig("", "", batch_size=1, flip=1.0), batcher, rows, 0)
    stored = np.array(image)[:, ::-1]
    white = np.where((stored == (255, 0, 255)).all(2, keepdims=True), 255, stored)
    pixels = pixel_values([white if on_white else stored], processor.image_size)
    np.testing.assert_array_equal(batch.inputs.images[0], pixels)
