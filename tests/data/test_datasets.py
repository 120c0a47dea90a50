"""Published data sets, in miniature, are converted to rows to train and evaluate on."""

import contextlib
import json
import pickle

import numpy as np
import pytest
from PIL import Image
from support.mutations import mutations

from paligemma_jax.checkpoints.source import resolve
from paligemma_jax.data.datasets import convert
from paligemma_jax.data.refcoco import rasterize, read_pickle
from paligemma_jax.data.rows import read_examples
from paligemma_jax.metrics.cases import Case


@pytest.fixture
def make(tmp_path):
    """Write files (as JSON unless text or bytes) and images, and return the converted rows."""

    def run(name, files, images, **options):
        for file, content in files.items():
            if not isinstance(content, bytes | str):
                content = json.dumps(content)
            data = content.encode() if isinstance(content, str) else content
            (tmp_path / file).write_bytes(data)
        for image in images:
            (tmp_path / "pictures" / image).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (64, 48), "red").save(tmp_path / "pictures" / image)
        paths, output = [tmp_path / file for file in files], tmp_path / "out" / "rows.jsonl"
        count = convert(name, paths, tmp_path / "pictures", output, **options)
        rows = [json.loads(line) for line in output.read_text().splitlines()]
        assert len(rows) == count and all((output.parent / row["image"]).is_file() for row in rows)
        return rows

    return run


PEOPLE = ["nous les gosses"] * 6 + ["dakota"] * 4
TEXTVQA = {
    "dataset_type": "val",
    "data": [
        {
            "question": "what is the brand?",
            "image_id": "003a8ae2ef43b901",
            "answers": PEOPLE,
            "question_id": 34602,
        }
    ],
}
COCO = {
    "images": [{"id": 9, "file_name": "COCO_val2014_000000000009.jpg"}],
    "annotations": [
        {"image_id": 9, "id": 1, "caption": "A cat. "},
        {"image_id": 9, "id": 2, "caption": "Two cats."},
    ],
}


def test_textvqa(make, tmp_path):
    (row,) = make("textvqa", {"TextVQA_0.5.1_val.json": TEXTVQA}, ["003a8ae2ef43b901.jpg"])
    assert row == {
        "image": "../pictures/003a8ae2ef43b901.jpg",
        "prefix": "answer en what is the brand?",
        "suffix": "nous les gosses",
        "answers": PEOPLE,
        "id": 34602,
    }
    assert read_examples(tmp_path / "out" / "rows.jsonl")[0].suffix == "nous les gosses"
    rows = make(
        "textvqa", {"TextVQA_0.5.1_val.json": TEXTVQA}, [], every_answer=True, prompt="q: {}"
    )
    assert [row["suffix"] for row in rows] == PEOPLE and rows[0][
        "prefix"
    ] == "q: what is the brand?"


def test_vqav2(make):
    questions = {
        "data_subtype": "val2014",
        "questions": [{"image_id": 42, "question": "Is it?", "question_id": 42000}],
    }
    answers = [{"answer": "yes", "answer_confidence": "yes", "answer_id": i} for i in range(1, 11)]
    annotations = {
        "annotations": [
            {
                "question_id": 42000,
                "image_id": 42,
                "answers": answers,
                "answer_type": "yes/no",
                "question_type": "is it",
            }
        ]
    }
    (row,) = make(
        "vqav2",
        {"questions.json": questions, "annotations.json": annotations},
        ["COCO_val2014_000000000042.jpg"],
    )
    assert (row["prefix"], row["suffix"], row["answers"]) == (
        "answer en Is it?",
        "yes",
        ["yes"] * 10,
    )
    assert (row["type"], row["question_type"], row["id"]) == ("yes/no", "is it", 42000)
    (row,) = make(
        "vqav2",
        {"questions.json": questions | {"data_subtype": "test-dev2015"}},
        ["COCO_test2015_000000000042.jpg"],
    )
    assert "suffix" not in row and row["image"].endswith("COCO_test2015_000000000042.jpg")


def test_docci(make):
    items = [
        {
            "example_id": f"{split}_00000",
            "split": split,
            "image_file": f"{split}_00000.jpg",
            "description": "A dog.\nIt runs.",
        }
        for split in ("train", "test")
    ]
    lines = "".join(json.dumps(item) + "\n" for item in items)
    (row,) = make(
        "docci", {"docci_descriptions.jsonlines": lines}, ["test_00000.jpg"], split="test"
    )
    assert (row["prefix"], row["suffix"], row["id"]) == (
        "caption en",
        "A dog.\nIt runs.",
        "test_00000",
    )


def test_chartqa(make):
    files = {
        "test_human.json": [{"imgname": "1.png", "query": "How many?", "label": "14"}],
        "test_augmented.json": [{"imgname": "2.png", "query": "Which?", "label": 2}],
    }
    human, augmented = make("chartqa", files, ["1.png", "2.png"])
    assert (human["prefix"], human["suffix"], human["type"]) == ("How many?", "14", "human")
    assert (augmented["suffix"], augmented["type"]) == ("2", "augmented")


def test_docvqa(make):
    about = {
        "questionId": 337,
        "question": "Which date?",
        "question_types": ["handwritten", "form"],
        "docId": 1,
    }
    item = about | {"image": "documents/xnbl0037_1.png", "answers": ["1/8/93", "1/8/1993"]}
    (row,) = make(
        "docvqa",
        {"val_v1.0_withQT.json": {"dataset_name": "SP-DocVQA", "data": [item]}},
        ["documents/xnbl0037_1.png"],
    )
    assert (row["prefix"], row["suffix"], row["answers"], row["type"]) == (
        "Which date?",
        "1/8/93",
        ["1/8/93", "1/8/1993"],
        "handwritten, form",
    )


def test_coco_captions(make):
    (row,) = make(
        "coco-captions", {"captions_val2014.json": COCO}, ["COCO_val2014_000000000009.jpg"]
    )
    assert (row["prefix"], row["suffix"], row["answers"]) == (
        "caption en",
        "A cat.",
        ["A cat.", "Two cats."],
    )
    karpathy = {
        "images": [
            {
                "filepath": "val2014",
                "filename": "a.jpg",
                "cocoid": 5,
                "split": split,
                "sentences": [{"raw": f"{split} cat "}],
            }
            for split in ("test", "val")
        ]
    }
    (row,) = make("coco-captions", {"dataset_coco.json": karpathy}, ["val2014/a.jpg"], split="val")
    assert (row["suffix"], row["id"]) == ("val cat", 5)


# ---- RefCOCO

REFS = [
    {
        "ann_id": 7,
        "image_id": 1,
        "file_name": "COCO_train2014_1_1.jpg",
        "split": "testA",
        "sent_ids": [3, 4],
        "sentences": [
            {"tokens": ["left", "man"], "raw": "left man", "sent_id": 3, "sent": "left man"},
            {"tokens": ["guy"], "raw": "guy; here", "sent_id": 4, "sent": "guy; here"},
        ],
    },
    {
        "ann_id": 8,
        "image_id": 1,
        "file_name": "x",
        "split": "val",
        "sent_ids": [5],
        "sentences": [{"tokens": ["dog"], "raw": "dog", "sent_id": 5, "sent": "dog"}],
    },
]
PHOTO = "COCO_train2014_000000000001.jpg"
POLYGON = [8.0, 12.0, 40.0, 12.0, 40.0, 36.0, 8.0, 36.0]
RUNS = {"counts": [60 * 48, 4 * 48], "size": [48, 64]}
INSTANCES = {
    "images": [{"id": 1, "file_name": PHOTO, "width": 64, "height": 48}],
    "annotations": [
        {"id": 7, "image_id": 1, "bbox": [8, 12, 32, 24], "segmentation": [POLYGON]},
        {"id": 8, "image_id": 1, "bbox": [60, 0, 9, 48], "segmentation": RUNS, "iscrowd": 1},
    ],
}
MAN = "<loc0256><loc0128><loc0767><loc0639>"


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_refcoco_boxes(make, protocol):
    files = {"refs(unc).p": pickle.dumps(REFS, protocol), "instances.json": INSTANCES}
    first, second = make("refcoco-detect", files, [PHOTO], split="testA")
    assert (first["prefix"], first["suffix"]) == ("detect left man", f"{MAN} left man")
    assert (first["boxes"], first["labels"], first["id"]) == ([[8, 12, 40, 36]], ["left man"], 3)
    assert second["prefix"] == "detect guy, here"
    (edge,) = make("refcoco-detect", files, [], split="val")
    assert edge["boxes"] == [[60, 0, 64, 48]]  # clipped to the image


def test_refcoco_masks(make, tmp_path):
    files = {"refs(unc).p": pickle.dumps(REFS, 2), "instances.json": INSTANCES}
    rows = make("refcoco-segment", files, [PHOTO])
    assert [row["prefix"] for row in rows] == ["left man", "guy, here", "dog"]
    assert rows[0]["suffix"] == MAN
    expected = np.zeros((2, 48, 64), bool)
    expected[0, 12:36, 8:40], expected[1, :, 60:] = True, True
    for row, mask in zip(rows[1:], expected, strict=True):
        np.testing.assert_array_equal(Case(row, tmp_path / "out").reference_mask(None), mask)
    rows = make("refcoco-segment", files, [], codec=resolve("tiny").codec_file)
    assert rows[0]["suffix"].count("<seg") == 16 and rows[0]["suffix"].startswith(f"{MAN}<seg")


def test_polygons_are_filled_as_by_pycocotools():
    """Masks match except for edge pixels, which pycocotools rounds differently."""
    coco = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(0)
    for _ in range(20):
        angle = np.sort(rng.uniform(0, 2 * np.pi, 12))
        x = 100 + rng.uniform(30, 80, 12) * np.cos(angle)
        y = 90 + rng.uniform(30, 80, 12) * np.sin(angle)
        polygons = [np.stack([x, y], 1).ravel().tolist()]
        mask = np.asarray(rasterize(polygons, (200, 180))) > 0
        theirs = coco.decode(coco.frPyObjects(polygons, 180, 200))[..., 0] > 0
        assert (mask & theirs).sum() / (mask | theirs).sum() > 0.97


HOSTILE_PICKLES = {
    "global": b"cos\nsystem\n(S'echo hi'\ntR.",
    "inst": b"(S'echo hi'\nios\nsystem\n.",
    "stack_global": pickle.dumps(print, 4),
    "old function": pickle.dumps(print, 0),
    "array": pickle.dumps(np.zeros(3)),
    "class": pickle.dumps(np.random.default_rng(0)),
    "extension": b"\x80\x02\x82\x01.",
    "persistent": b"Pos.system\n.",
    "build": b"\x80\x02]}U\x01aK\x01sb.",
}


def test_pickle_files_of_plain_data_are_read(tmp_path):
    file = tmp_path / "data.p"
    data = [
        {"a": [1, 2**40, -3, 300, 70000, 1.5], "b": ("x", None, True), "ü": {"t": (), "q": (1,)}},
        (1, 2, 3, 4),
        "x" * 300,
    ]
    data.append(data[0])
    for protocol in range(6):
        for content in (REFS, data):
            file.write_bytes(pickle.dumps(content, protocol))
            assert read_pickle(file) == content
    file.write_bytes(b"\x80\x02]r\xff\xff\xff\x7f.")  # a memo index of 2**31 - 1
    assert read_pickle(file) == []


@pytest.mark.parametrize("name", HOSTILE_PICKLES)
def test_hostile_pickle_files_are_refused_in_one_line(tmp_path, capfd, name):
    (tmp_path / "data.p").write_bytes(HOSTILE_PICKLES[name])
    with pytest.raises(ValueError, match=r"data\.p is not a pickle file of plain data") as error:
        read_pickle(tmp_path / "data.p")
    assert "\n" not in str(error.value) and capfd.readouterr() == ("", "")


def test_damaged_pickle_files_are_refused(tmp_path):
    rng, intact = np.random.default_rng(0), pickle.dumps(REFS, 2)
    for _ in range(500):
        damaged = bytearray(intact[: rng.integers(len(intact) + 1)])
        for at in rng.integers(max(len(damaged), 1), size=3 * bool(damaged)):
            damaged[at] = rng.integers(256)
        (tmp_path / "data.p").write_bytes(damaged)
        with contextlib.suppress(ValueError):
            read_pickle(tmp_path / "data.p")


def test_pickle_files_of_other_data_are_refused(make):
    """Sets and numbers are plain data, but not what RefCOCO publishes."""
    for content in ({1, 2}, 3, {"a": 1}, [[1]]):
        files = {"refs(unc).p": pickle.dumps(content, 4), "instances.json": INSTANCES}
        with pytest.raises(ValueError, match=r"refs\(unc\).p: .* must be an (array|object), got"):
            make("refcoco-detect", files, [])


# ---- Errors


def test_files_that_are_not_as_published_are_refused(make, tmp_path):
    with pytest.raises(
        ValueError, match=r"1 images are missing, such as .*01.jpg: pass .*--images"
    ):
        make("textvqa", {"a.json": TEXTVQA}, [])
    with pytest.raises(ValueError, match=r"a.json: data is missing; textvqa is published as: Text"):
        make("textvqa", {"a.json": {"questions": []}}, [])
    with pytest.raises(
        ValueError,
        match=r"a.json: data\[0\].question is missing; textvqa is published as: TextVQA_0.5.1_val",
    ):
        make("textvqa", {"a.json": {"data": [{"image_id": 1}]}}, [])
    with pytest.raises(ValueError, match=r"a.json: not readable JSON"):
        make("docvqa", {"a.json": "{"}, [])
    with pytest.raises(ValueError, match="no rows of split nowhere"):
        make(
            "docci",
            {
                "a.jsonlines": json.dumps(
                    {"example_id": "1", "split": "test", "image_file": "1.jpg", "description": "x"}
                )
            },
            [],
            split="nowhere",
        )
    with pytest.raises(ValueError, match=r"--files must include refs\(...\).p, which contains"):
        make("refcoco-detect", {"instances.json": INSTANCES}, [])
    with pytest.raises(ValueError, match="no converter for okvqa, only for textvqa, vqav2"):
        convert("okvqa", [], tmp_path, tmp_path / "out.jsonl")
    with pytest.raises(ValueError, match=r"none.json: no such file"):
        convert("docvqa", [tmp_path / "none.json"], tmp_path, tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists() and not (tmp_path / "out" / "rows.jsonl").exists()


PUBLISHED = {
    "textvqa": TEXTVQA,
    "vqav2": {
        "data_subtype": "val2014",
        "questions": [{"image_id": 42, "question": "Is it?", "question_id": 42000}],
        "annotations": [{"question_id": 42000, "image_id": 42, "answers": [{"answer": "yes"}]}],
    },
    "docci": {"example_id": "1", "split": "test", "image_file": "1.jpg", "description": "x"},
    "chartqa": [{"imgname": "1.png", "query": "How many?", "label": "14"}],
    "docvqa": {"data": [{"questionId": 1, "question": "?", "image": "a.png", "answers": ["1"]}]},
    "coco-captions": COCO,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_of_any_json_are_converted_or_refused(tmp_path, name):
    file, converted = tmp_path / "a.json", 0
    for text in mutations(PUBLISHED[name]):
        file.write_text(text)
        try:
            converted += convert(name, [file], tmp_path, tmp_path / "rows.jsonl")
        except ValueError as error:
            assert len(str(error)) < 600 and "Traceback" not in str(error)
    assert not converted  # the images are missing


def test_instances_of_any_json_are_converted_or_refused(tmp_path):
    files = [tmp_path / "refs.p", tmp_path / "instances.json"]
    files[0].write_bytes(pickle.dumps(REFS, 2))
    for text in mutations(INSTANCES):
        files[1].write_text(text)
        with pytest.raises(ValueError) as error:
            convert("refcoco-detect", files, tmp_path, tmp_path / "rows.jsonl")
        assert len(str(error.value)) < 600
