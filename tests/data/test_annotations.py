"""Annotated boxes and masks become rows, the same from every format."""

from __future__ import annotations

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image
from support.mutations import mutations

from paligemma_jax.checkpoints.source import resolve
from paligemma_jax.data.annotations import READERS, convert
from paligemma_jax.data.shapes import Runs, decompress, rasterize
from paligemma_jax.processing.locations import parse_detections, with_masks
from paligemma_jax.processing.mask_codec import load_codec

WIDTH, HEIGHT = 100, 50
CAT, DOG = (10, 5, 60, 45), (70.5, 10, 100, 40)  # left, top, right, bottom
ROW = {
    "image": "photos/a.png",
    "prefix": "detect cat ; dog, big",
    "suffix": "<loc0102><loc0102><loc0921><loc0614> cat ; "
    "<loc0205><loc0721><loc0818><loc1023> dog, big",
    "boxes": [list(CAT), list(DOG)],
    "labels": ["cat", "dog, big"],
}
TRIANGLE = [10.0, 5.0, 60.0, 5.0, 60.0, 45.0]


def coco(*annotations):
    image = {"id": 7, "file_name": "a.png", "width": WIDTH, "height": HEIGHT}
    empty = {"id": 8, "file_name": "b.png", "width": WIDTH, "height": HEIGHT}
    names = [{"id": 1, "name": "cat"}, {"id": 3, "name": "dog; big"}]
    rows = [{"image_id": 7, "iscrowd": 0} | annotation for annotation in annotations]
    return {"images": [image, empty], "annotations": rows, "categories": names}


COCO = coco(
    {"category_id": 1, "bbox": [10, 5, 50, 40], "segmentation": [TRIANGLE]},
    {"category_id": 3, "bbox": [70.5, 10, 90, 30], "segmentation": [[70.5, 10, 160.5, 10, 90, 40]]},
    {"category_id": 3, "bbox": [0, 0, 9, 9], "iscrowd": 1},
    {"category_id": 3, "bbox": [200, 0, 9, 9]},
    {"category_id": 1, "bbox": [5, 5, 0.01, 9]},
)
VOC = f"""<annotation><filename>a.png</filename>
<size><width>{WIDTH}</width><height>{HEIGHT}</height><depth>3</depth></size>
<object><name>cat</name><pose>x</pose>
  <bndbox><xmin>11</xmin><ymin>6</ymin><xmax>60</xmax><ymax>45</ymax></bndbox></object>
<object><name>dog; big</name><part><name>head</name></part>
  <bndbox><xmin>71.5</xmin><ymin>11</ymin><xmax>160</xmax><ymax>40</ymax></bndbox></object>
</annotation>"""
LABELME = {
    "version": "5.5",
    "imagePath": "..\\photos\\a.png",
    "imageData": None,
    "imageWidth": WIDTH,
    "imageHeight": HEIGHT,
    "shapes": [
        {"label": "cat", "points": [[60, 45], [10, 5]], "shape_type": "rectangle"},
        {"label": "dog; big", "points": [[70.5, 10], [160, 10], [80, 40]], "flags": {}},
        {"label": "nose", "points": [[3, 3]], "shape_type": "point"},
    ],
}
YOLO = """0 0.35 0.5 0.5 0.8

2 0.705 0.2 1.6 0.2 0.8 0.8
"""


@pytest.fixture
def files(tmp_path):
    """The same two objects in every format, by its name."""
    (tmp_path / "photos").mkdir()
    for name in ("a", "b"):
        Image.new("RGB", (WIDTH, HEIGHT), "teal").save(tmp_path / "photos" / f"{name}.png")
    for folder in ("voc", "labelme", "labels"):
        (tmp_path / folder).mkdir()
    (tmp_path / "instances.json").write_text(json.dumps(COCO))
    (tmp_path / "voc" / "a.xml").write_text(VOC)
    (tmp_path / "labelme" / "a.json").write_text(json.dumps(LABELME))
    (tmp_path / "labels" / "a.txt").write_text(YOLO)
    (tmp_path / "data.yaml").write_text("names:\n  0: cat\n  2: 'dog; big'\n")
    return {
        "coco": [tmp_path / "instances.json"],
        "voc": [tmp_path / "voc"],
        "labelme": [tmp_path / "labelme"],
        "yolo": [tmp_path / "labels", tmp_path / "data.yaml"],
    }


@pytest.mark.parametrize("name", READERS)
def test_every_format_gives_the_same_row(files, tmp_path, name):
    result = convert(name, files[name], tmp_path / "photos", tmp_path / "rows.jsonl")
    (row,) = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert row.pop("boxes") == [pytest.approx(box) for box in ROW["boxes"]]
    expected = {key: value for key, value in ROW.items() if key != "boxes"}
    assert row == expected | ({"id": 7} if name == "coco" else {})
    assert (result.rows, result.objects) == (1, 2)
    dropped = {
        "coco": ["that are crowds", "without area in the image", "thinner than a <loc> step"],
        "labelme": ["that are points or lines"],
    }
    assert result.dropped == dict.fromkeys(dropped.get(name, []), 1)
    assert result.empty_images == (name == "coco")
    picture = Image.open(result.picture)
    assert picture.width == 456 and len(set(picture.getdata())) > 3


def test_every_row_asks_for_the_same_labels(files, tmp_path):
    """Other objects are dropped. An image without the labels gets an empty answer."""
    output = tmp_path / "rows.jsonl"
    labels = ["bird", "dog; big"]
    result = convert("coco", files["coco"], tmp_path / "photos", output, labels=labels)
    some, none = [json.loads(line) for line in output.read_text().splitlines()]
    assert some["prefix"] == none["prefix"] == "detect bird ; dog, big"
    assert some["labels"] == ["dog, big"] and some["suffix"] == ROW["suffix"].split(" ; ")[1]
    assert (none["suffix"], none["boxes"], none["labels"]) == ("", [], [])
    assert (result.rows, result.objects, result.empty_images) == (2, 1, 0)
    assert result.dropped["with other labels"] == 2
    with pytest.raises(ValueError, match=r"no objects in 2 images .* with other labels"):
        convert("coco", files["coco"], tmp_path / "photos", output, labels=["bird"])


def test_images_whose_objects_cannot_be_written_are_no_negatives(files, tmp_path):
    crowd = {"image_id": 8, "category_id": 1, "bbox": [0, 0, 9, 9], "iscrowd": 1}
    files["coco"][0].write_text(json.dumps(coco(*COCO["annotations"], crowd)))
    output = tmp_path / "rows.jsonl"
    result = convert("coco", files["coco"], tmp_path / "photos", output, labels=["cat"])
    assert (result.rows, result.empty_images) == (1, 1)


def test_masks_are_written_and_drawn(files, tmp_path):
    file = resolve("tiny").codec_file
    output = tmp_path / "rows.jsonl"
    result = convert("coco", files["coco"], tmp_path / "photos", output, "segment", file)
    row = json.loads(output.read_text())
    assert row["prefix"] == "segment cat ; dog, big" and row["suffix"].count("<seg") == 32
    size = (WIDTH, HEIGHT)
    cat, _ = with_masks(parse_detections(row["suffix"], size), size, load_codec(file))
    mask = np.asarray(rasterize([TRIANGLE], size)) > 0
    assert (cat.mask & mask).sum() / (cat.mask | mask).sum() > 0.6  # tiny's codec knows digits
    assert result.objects == 2 and result.picture.is_file()
    with pytest.raises(ValueError, match="--task segment requires --codec"):
        convert("coco", files["coco"], tmp_path / "photos", output, "segment")
    with pytest.raises(ValueError, match="which Pascal VOC's XML files do not have"):
        convert("voc", files["voc"], tmp_path / "photos", output, "segment", file)


def test_runs_are_decoded_as_by_pycocotools():
    coco = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(0)
    for i in range(50):
        height, width = rng.integers(1, 300, 2).tolist()
        mask = rng.random((height, width)) < rng.choice([0, 0.001, 0.1, 0.5, 1])
        encoded = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
        text = encoded["counts"].decode()
        drawn = rasterize(Runs((height, width), text), (width, height))
        np.testing.assert_array_equal(np.asarray(drawn) > 0, mask, err_msg=str(i))
        drawn = rasterize(Runs((height, width), decompress(text)), (width, height))
        np.testing.assert_array_equal(np.asarray(drawn) > 0, mask)


def test_polygons_are_within_a_pixel_of_pycocotools():
    coco, morphology = pytest.importorskip("pycocotools.mask"), pytest.importorskip("scipy.ndimage")
    rng = np.random.default_rng(0)
    for _ in range(20):
        points = rng.random((8, 2)) * [200, 180]
        polygon = points[np.argsort(np.arctan2(*(points - points.mean(0)).T))].ravel().tolist()
        mine = np.asarray(rasterize([polygon], (200, 180))) > 0
        theirs = coco.decode(coco.frPyObjects([polygon], 180, 200))[..., 0] > 0
        square = np.ones((3, 3))
        grown, shrunk = (
            morphology.binary_dilation(theirs, square),
            morphology.binary_erosion(theirs, square, border_value=1),
        )
        assert (mine <= grown).all() and (shrunk <= mine).all()


@pytest.mark.parametrize(
    "counts, error",
    [
        ([1, 2], "must fill its 5000 pixels, got 3"),
        ([5001], "must fill its 5000 pixels, got 5001"),
        ("0\n", "must be COCO's"),
        ("P", "must be complete"),
        ("o" * 99, "must be COCO's"),
        ("O", "must fill its 5000 pixels"),
    ],
)
def test_damaged_runs_are_refused(counts, error):
    with pytest.raises(ValueError, match=error):
        rasterize(Runs((50, 100), counts), (100, 50))


def png(mask):
    out = io.BytesIO()
    Image.fromarray(mask).save(out, "PNG")
    return base64.b64encode(out.getvalue()).decode()


def test_shapes_of_labelme(files, tmp_path):
    """A mask fills the box of its points; a circle is a center and a point."""
    mask = np.zeros((10, 20), bool)
    mask[2:8, 5:15] = True
    shapes = [
        {"label": "x", "points": [[30, 20], [50, 30]], "shape_type": "mask", "mask": png(mask)},
        {"label": "o", "points": [[20, 20], [20, 30]], "shape_type": "circle", "mask": None},
    ]
    file = tmp_path / "labelme" / "a.json"
    file.write_text(json.dumps(LABELME | {"shapes": shapes}))
    (item,) = READERS["labelme"]([file], tmp_path / "photos", True)
    drawn = np.asarray(rasterize(item.objects[0].shape, (WIDTH, HEIGHT))) > 0
    expected = np.zeros((HEIGHT, WIDTH), bool)
    expected[22:28, 35:45] = True
    np.testing.assert_array_equal(drawn, expected)
    assert item.objects[1].box == pytest.approx((10, 10, 30, 30), abs=0.05)
    circle = np.asarray(rasterize(item.objects[1].shape, (WIDTH, HEIGHT))) > 0
    assert circle.sum() == pytest.approx(np.pi * 100, rel=0.05)
    file.write_text(json.dumps(LABELME | {"shapes": [shapes[0] | {"mask": "AAAA"}]}))
    with pytest.raises(ValueError, match=r"a.json: mask must be a PNG file in base64"):
        list(READERS["labelme"]([file], tmp_path / "photos", True))


LAUGHS = '<?xml version="1.0"?><!DOCTYPE lolz [<!ENTITY a "aaa"><!ENTITY b "&a;&a;">]>' + VOC
WRONG = {
    "instances.json": [
        (json.dumps(COCO)[:-9], r"instances.json: not readable JSON"),
        (json.dumps(COCO | {"images": []}), r"annotations\[0\] must refer to an image and a"),
        (json.dumps(coco()), r"no objects in 2 images \(none annotated\)"),
        (json.dumps(COCO).replace('"width": 100', '"width": 50'), "annotated with 50 x 50"),
        (json.dumps(COCO).replace("a.png", "c.png"), r"1 images are missing, such as .*c.png"),
    ],
    "voc/a.xml": [
        (LAUGHS, r"a.xml must not contain <!DOCTYPE"),
        (VOC[:-9], r"a.xml is not XML"),
        (VOC.replace("11</xmin>", "x</xmin>"), r"object\[0\].bndbox.xmin must be a number"),
        (VOC.replace("<filename>a.png</filename>", ""), r"a.xml: filename is missing"),
    ],
    "labels/a.txt": [
        ("0 0.1 0.2 0.3", r"a.txt: line 1 must be a class and x y width height"),
        ("9 0.1 0.2 0.3 0.4", r"line 1: class must be one of the 2 names, got 9"),
        ("cat 1 1 1 1", r"line 1 must be numbers, got 'cat 1 1 1 1'"),
        ("0 nan 0.2 0.3 0.4", r"line 1 must be a class and"),
    ],
    "data.yaml": [
        ("names: 3", r"data.yaml: names must be an object or an array, got 3"),
        ("names: [", r"data.yaml is not YAML"),
    ],
    "labelme/a.json": [(json.dumps(LABELME | {"imagePath": 3}), r"imagePath must be a string")],
}
FORMATS = {"instances": "coco", "voc": "voc", "label": "yolo", "data": "yolo", "labelme": "labelme"}


@pytest.mark.parametrize(
    "file, case", [(file, i) for file in WRONG for i in range(len(WRONG[file]))]
)
def test_damaged_annotations_are_refused_in_one_line(files, tmp_path, file, case):
    text, error = WRONG[file][case]
    (tmp_path / file).write_text(text)
    name = [name for start, name in FORMATS.items() if file.startswith(start)][-1]
    with pytest.raises(ValueError, match=error) as refusal:
        convert(name, files[name], tmp_path / "photos", tmp_path / "rows.jsonl")
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 500
    assert not (tmp_path / "rows.jsonl").exists()


@pytest.mark.parametrize("name, content", [("coco", COCO), ("labelme", LABELME)])
def test_annotations_of_any_json_are_read_or_refused(files, tmp_path, name, content):
    (path,) = files[name]
    file = path if path.is_file() else path / "a.json"
    for text in mutations(content):
        file.write_text(text)
        try:
            list(READERS[name]([file], tmp_path / "photos", True))
        except ValueError as error:
            assert str(error).startswith(str(file)) and len(str(error)) < 400


def test_the_command_prints_what_was_left_out(command, files, tmp_path):
    arguments = ("coco", "--files", *files["coco"], "--images", tmp_path / "photos")
    output = tmp_path / "out" / "rows.jsonl"
    code, out, error = command("annotations", *arguments, "--output", output)
    assert code == 0, error
    assert out.startswith("1 rows with 2 objects; 1 objects that are crowds dropped; ")
    assert out.endswith(
        f"1 images without objects left out: {output}; check {output.parent}/rows.png\n"
    )
    assert json.loads(output.read_text())["image"] == "../photos/a.png"
    code, _, error = command("annotations", "yolo", *arguments[1:], "--output", output)
    assert code == 2 and "--files must include data.yaml or classes.txt" in error
