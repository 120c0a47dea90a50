"""The rendered shapes and their annotations."""

import json

import numpy as np
import pytest
from PIL import Image

from paligemma_jax.data.annotations import convert
from paligemma_jax.processing.locations import parse_detections
from paligemma_jax.tiny.shapes import HEIGHT, LABELS, OVERLAP, WIDTH, draw_scene, write_shapes


def scenes(count, seed=0):
    return [draw_scene(np.random.default_rng([seed, i])) for i in range(count)]


def covered(a, b):
    width, height = (min(a[i + 2], b[i + 2]) - max(a[i], b[i]) for i in (0, 1))
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return max(0, width) * max(0, height) / min(areas)


def test_images_have_one_to_four_shapes_that_overlap_little():
    drawn = [shapes for _, shapes in scenes(60)]
    assert {len(shapes) for shapes in drawn} == {1, 2, 3, 4}
    assert {shape.label for shapes in drawn for shape in shapes} == set(LABELS)
    for shapes in drawn:
        boxes = [shape.box for shape in shapes]
        assert boxes == sorted(boxes)
        for i, (left, top, right, bottom) in enumerate(boxes):
            assert 0 <= left < right <= WIDTH and 0 <= top < bottom <= HEIGHT
            assert all(covered(boxes[i], box) <= OVERLAP for box in boxes[:i])


def test_boxes_are_tight_around_what_is_painted():
    """On images with one shape: pixels that differ from the background are in its box."""
    single = [(image, shapes[0]) for image, shapes in scenes(60) if len(shapes) == 1]
    assert len(single) > 5
    for image, shape in single:
        pixels = np.asarray(image, float)
        left, top, right, bottom = (round(value) for value in shape.box)
        ground = np.concatenate([pixels[:3].reshape(-1, 3), pixels[-3:].reshape(-1, 3)])
        inside = pixels[(top + bottom) // 2, (left + right) // 2]
        middle = np.mean(ground, axis=0) / 2 + inside / 2
        nearer = (pixels - middle) @ (inside - np.mean(ground, axis=0)) > 0
        rows, columns = np.flatnonzero(nearer.mean(1) > 0.02), np.flatnonzero(nearer.mean(0) > 0.02)
        painted = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
        np.testing.assert_allclose(painted, shape.box, atol=6)


def test_files_are_the_same_for_the_same_seed(tmp_path):
    """More rows only add images; another seed draws others."""
    folders = [
        write_shapes(str(tmp_path / name), rows, seed)
        for name, rows, seed in (("few", 2, 0), ("more", 3, 0), ("other", 2, 1))
    ]
    few, more, other = [
        [(folder / f"images/{i:05}.jpg").read_bytes() for i in range(2)] for folder in folders
    ]
    assert few == more and not set(few) & set(other)
    few, more = (json.loads((folder / "instances.json").read_text()) for folder in folders[:2])
    assert more["annotations"][: len(few["annotations"])] == few["annotations"]
    assert [image["file_name"] for image in more["images"]][2] == "images/00002.jpg"


def test_annotations_convert_to_rows(tmp_path):
    folder = write_shapes(str(tmp_path / "shapes"), rows=3)
    content = json.loads((folder / "instances.json").read_text())
    output = tmp_path / "rows.jsonl"
    result = convert("coco", [folder / "instances.json"], folder, output, labels=LABELS)
    assert (result.rows, result.objects) == (3, len(content["annotations"]))
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    for (image, shapes), row in zip(scenes(3), rows, strict=True):
        assert row["prefix"] == "detect circle ; square ; triangle ; star"
        assert Image.open(tmp_path / row["image"]).size == image.size
        parsed = parse_detections(row["suffix"], image.size)
        assert [found.label for found in parsed] == [shape.label for shape in shapes]
        for found, shape in zip(parsed, shapes, strict=True):
            np.testing.assert_allclose(found.box, shape.box, atol=0.2)


@pytest.mark.parametrize(("rows", "seed", "error"), [(0, 0, "--rows"), (1, -1, "--seed")])
def test_bad_options_are_refused(tmp_path, rows, seed, error):
    with pytest.raises(ValueError, match=f"{error} must be at least"):
        write_shapes(str(tmp_path), rows, seed)
