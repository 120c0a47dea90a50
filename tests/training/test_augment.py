"""Pictures that change at random, and the boxes that go with them."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from paligemma_jax.data.rows import Example
from paligemma_jax.training.augment import Augment, inside, moved

SIZE = 256


def picture(boxes):
    """Black, with a white rectangle for each box (y0, x0, y1, x1 in pixels)."""
    array = np.zeros((SIZE, SIZE, 3), np.uint8)
    for y0, x0, y1, x1 in boxes:
        array[y0:y1, x0:x1] = 255
    return Image.fromarray(array)


def said(boxes):
    return " ; ".join("".join(f"<loc{round(v / SIZE * 1023):04}>" for v in box) + f" thing {i}" for i, box in enumerate(boxes))


def told(text):
    return [np.array([int(part[4:8]) for part in piece.split(">")[:4]]) / 1023 for piece in text.split(" ; ") if piece]


@pytest.mark.parametrize("augment", [Augment(flip=1.0), Augment(crop=0.5), Augment(flip=0.5, crop=0.6, color=0.3)])
def test_boxes_lie_where_the_picture_shows_them(augment):
    rng = np.random.default_rng(0)
    for _ in range(200):
        y0, x0 = rng.integers(0, 180, 2)
        box = (y0, x0, y0 + rng.integers(30, 76), x0 + rng.integers(30, 76))
        new = augment(Example((picture([box]),), "detect thing", said([box]), 1.0, 1), rng)
        pixels = np.asarray(new.images[0])[..., 0] > 40
        rows, columns = np.flatnonzero(pixels.any(1)), np.flatnonzero(pixels.any(0))
        height, width = pixels.shape
        seen = np.array([rows[0] / height, columns[0] / width, (rows[-1] + 1) / height, (columns[-1] + 1) / width])
        (found,) = told(new.suffix)
        np.testing.assert_allclose(found, seen, atol=2.5 / min(height, width))
        assert new.suffix.endswith(" thing 0")


def test_boxes_that_are_cut_off_are_not_spoken_of():
    boxes = [(0, 0, 40, 40), (200, 200, 250, 250)]
    rng, counts = np.random.default_rng(1), set()
    for _ in range(200):
        new = Augment(crop=0.4)(Example((picture(boxes),), "detect thing", said(boxes), 1.0, 1), rng)
        counts.add(len(told(new.suffix)))
        if new.images[0].size != (SIZE, SIZE) and len(told(new.suffix)) == 1:
            assert new.suffix.count("thing") == 1
    assert counts == {1, 2}


@pytest.mark.parametrize("gap", [" ; ", "; ", ";"])
def test_things_are_parted_as_they_were(gap):
    """Of a cat, a dog and a cow the dog is cut away, however they are parted."""
    cat, dog, cow = (
        "".join(f"<loc{v:04}>" for v in box) + name for box, name in (((10, 10, 200, 200), "cat"), ((800,) * 4, "dog"), ((0, 0, 99, 99), "cow"))
    )
    seen = moved(gap.join([cat, dog, cow]), lambda box: inside(box, np.array([0, 0, 0.5, 0.5])))
    assert seen == "<loc0020><loc0020><loc0400><loc0400>cat" + gap + "<loc0000><loc0000><loc0198><loc0198>cow"


@pytest.mark.parametrize(
    "prefix,suffix",
    [
        ("detect the left cup", "<loc0000><loc0000><loc0400><loc0400> cup"),
        ("caption en", "a man on the Right"),
        ("segment cat", "<loc0001>" * 4 + "<seg001>" * 16),
    ],
)
def test_what_must_not_be_mirrored(prefix, suffix):
    example = Example((picture([(0, 0, 40, 40)]),), prefix, suffix, 1.0, 1)
    new = Augment(flip=1.0)(example, np.random.default_rng(0))
    assert new.suffix == suffix and (np.asarray(new.images[0]) == np.asarray(example.images[0])).all()


def test_the_same_seed_gives_the_same_picture():
    example = Example((picture([(10, 10, 90, 90)]),), "detect thing", said([(10, 10, 90, 90)]), 1.0, 1)
    one, two = (Augment(0.5, 0.5, 0.5)(example, np.random.default_rng((3, 4))) for _ in range(2))
    assert one.suffix == two.suffix and (np.asarray(one.images[0]) == np.asarray(two.images[0])).all()


def test_boxes_in_the_question_go_along():
    new = Augment(flip=1.0, crop=0.5)(Example((picture([]),), said([(0, 0, 40, 64)]), "a cup", 1.0, 1), np.random.default_rng(0))
    assert new.prefix == "<loc0000><loc0767><loc0160><loc1023> thing 0" and new.images[0].size == (SIZE, SIZE)
