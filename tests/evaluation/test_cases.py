"""Cases: answers, references, and the files that they are read from."""

import contextlib
import json

import numpy as np
import pytest
from PIL import Image
from support.mutations import mutations

from paligemma_jax.checkpoints.source import resolve
from paligemma_jax.evaluation.cases import collect, load_answers
from paligemma_jax.evaluation.evaluate import evaluate
from paligemma_jax.evaluation.html import html
from paligemma_jax.metrics.cases import Case
from paligemma_jax.metrics.comparison import score_cases
from paligemma_jax.metrics.registry import metric_names
from paligemma_jax.processing.mask_codec import load_codec
from paligemma_jax.tiny import dataset


def test_references_are_read_from_the_row(photo, tmp_path):
    row = {
        "image": "photo.png",
        "suffix": "<loc0000><loc0000><loc1023><loc0512> cat",
        "answer": "<loc0000><loc0000><loc1023><loc1023> cat",
    }
    plain = Case(row, tmp_path)
    assert plain.references == [row["suffix"]] and plain.size == (100, 50)
    assert plain.reference_detections[0].box == pytest.approx((0, 0, 50.05, 50), abs=0.01)
    assert plain.detections[0].score is None
    exact = {"boxes": [[1, 2, 30, 40]], "labels": ["dog"], "answers": ["a", "b"]}
    exact = Case(row | exact, tmp_path)
    assert exact.reference_detections[0].box == (1, 2, 30, 40)
    assert exact.reference_detections[0].label == "dog" and exact.references == ["a", "b"]
    pieces = [[f"<loc{n:04}>", -0.5] for n in (0, 0, 1023, 1023)] + [[" cat", -0.5], ["", -9]]
    scored = Case(row | {"pieces": pieces}, tmp_path)
    assert scored.detections[0].score == pytest.approx(np.exp(-0.5))
    assert scored.detections[0].label == "cat"
    with pytest.raises(ValueError, match=r"photo.png has no reference: add answers or suffix"):
        _ = Case({"image": "photo.png"}, tmp_path).references


def test_boxes_are_scored_in_pixels(photo, tmp_path):
    row = {"image": "photo.png", "boxes": [[0, 0, 50, 50]], "labels": ["cat"]}
    answers = ["<loc0000><loc0000><loc1023><loc1023> cat", "nothing"]
    cases = [Case(row | {"answer": answer}, tmp_path) for answer in answers]
    assert score_cases("box_iou", cases).each.tolist() == [0.5, 0]
    assert score_cases("box_accuracy", cases).value() == 0.5
    assert score_cases("ap50", cases).value() == pytest.approx(51 / 101)
    with pytest.raises(ValueError, match="box_iou needs a box in every row"):
        score_cases("box_iou", [Case({"image": "photo.png", "answer": "", "suffix": ""}, tmp_path)])


def test_rows_with_only_a_mask(photo, tmp_path, make_cases):
    """The mask is drawn with its bounding box; a missing file or box is an error."""
    mask = np.zeros((80, 120), np.uint8)
    mask[20:40, 30:70] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    row = {"image": "photo.png", "prefix": "segment cat", "answer": "", "mask": "mask.png"}
    case = Case(row, tmp_path)
    (reference,) = case.drawings(None)["reference"]
    assert reference.box == (30, 20, 70, 40) and reference.mask.sum() == 20 * 40
    assert "<figcaption>reference" in html(evaluate([case], ["mask_iou"], samples=5))
    with pytest.raises(ValueError, match=r"the row of photo.png: no mask at .*none.png"):
        evaluate([Case(row | {"mask": "none.png"}, tmp_path)], ["mask_iou"], samples=5)
    with pytest.raises(ValueError, match='average_precision needs "boxes" in the rows'):
        evaluate(make_cases(["yes", "no"]), ["coco"], samples=5)


@pytest.mark.parametrize(
    "fields, error",
    [
        ({"mask": 7}, "mask must be a string or null, got 7"),
        ({"boxes": [[1, 2, 3]]}, r"boxes\[0\] must be an array of length 4, got an array of 3"),
        ({"boxes": 5}, "boxes must be an array or null, got 5"),
    ],
)
def test_references_of_the_wrong_type_are_refused(tmp_path, fields, error):
    file = tmp_path / "wrong.jsonl"
    file.write_text(json.dumps({"image": "photo.png", "answer": ""} | fields) + "\n")
    with pytest.raises(ValueError, match=f"wrong.jsonl: line 1: {error}"):
        load_answers(file, file)


REFERENCES = {"answers": ["x"], "boxes": [[0, 0, 1, 1]], "labels": ["x"], "mask": "m.png"}
ANSWERED = {"image": ["a.png"], "prefix": "q", "suffix": "x", **REFERENCES}
ANSWERED |= {"answer": "x", "pieces": [["x", -0.5]], "more": [{}]}


def test_answers_of_any_json_are_read_or_refused_with_their_line(tmp_path):
    data, mine = tmp_path / "data.jsonl", tmp_path / "mine.jsonl"
    data.write_text(json.dumps(ANSWERED) + "\n")
    read = 0
    for text in mutations(ANSWERED):
        mine.write_text(text + "\n")
        try:
            load_answers(mine, data)
            read += 1
        except ValueError as error:
            assert str(error).startswith(str(mine)) and len(str(error)) < 300
    assert read > 50
    (tmp_path / "answers.jsonl").write_text(json.dumps(ANSWERED) + "\n")
    for text in mutations({"line": 1, "error": "gone", "row": ANSWERED}):
        (tmp_path / "errors.jsonl").write_text(text + "\n")
        with contextlib.suppress(ValueError):
            collect(data, tmp_path)


def test_labels_that_do_not_match_the_boxes_are_refused(tmp_path):
    row = {"image": "photo.png", "boxes": [[0, 0, 1, 1]], "labels": ["a", "b"]}
    with pytest.raises(ValueError, match="has 1 boxes, but 2 labels"):
        _ = Case(row, tmp_path).reference_detections


def test_null_counts_as_absent(photo, tmp_path):
    row = {"image": "photo.png", "prefix": None, "answers": None, "suffix": "a", "answer": "a"}
    case = Case(row | {"boxes": None, "labels": None, "mask": None, "type": None}, tmp_path)
    assert case.references == ["a"] and case.reference_detections == []
    assert evaluate([case], ["exact_match"], samples=5).intervals["exact_match"].value == 1
    with pytest.raises(ValueError, match="has no reference: add answers or suffix"):
        _ = Case({"image": "photo.png", "answers": [], "suffix": "a"}, tmp_path).references


def test_predictions_beside_answers_of_the_data_are_evaluated(tmp_path):
    """What `predict` wrote to rows that have an answer of their own, or a field called pieces."""
    own = {"image": "a.png", "prefix": "q", "answer": 4, "pieces": 32, "error": "none"}
    data, answers = tmp_path / "data.jsonl", tmp_path / "answers.jsonl"
    data.write_text(json.dumps(own) + "\n")
    answers.write_text(json.dumps(own | {"prediction": "x"}) + "\n")
    (tmp_path / "errors.jsonl").touch()
    (case,) = collect(data, tmp_path)
    assert case.answer == "x" and not case.failed and case.row["pieces"] is None


def test_runs_on_different_rows_are_not_compared(tmp_path, make_cases):
    first, second = make_cases(["yes", "no"])
    with pytest.raises(ValueError, match="--against has 1 rows, expected 2"):
        evaluate([first, second], ["exact_match"], against=[first])
    changed = Case(second.row | {"prefix": "other"}, tmp_path)
    with pytest.raises(
        ValueError, match=r"row 2 is \('photo.png', 'other'\), expected \('photo.png', 'q'\)"
    ):
        evaluate([first, second], ["exact_match"], against=[first, changed])
    with pytest.raises(ValueError, match=r"--metric must be one of .*cider.*, pope, coco; got ble"):
        metric_names(["bleurt"])


ROW = '{"image": "a.png", "prefix": "q", "answer": "x"}\n'


@pytest.mark.parametrize(
    "text, error",
    [
        (ROW + '{"image": "a.png"}\n', "mine.jsonl: line 2: answer must be a string, got null"),
        (ROW, "mine.jsonl has 1 rows, expected 2"),
        (ROW.replace("a.png", "b.png") * 2, r"different rows: row 1 is \('b.png', 'q'\)"),
        ("{\n", "mine.jsonl: line 1: not readable JSON"),
    ],
)
def test_files_of_answers_must_match_the_data(tmp_path, text, error):
    data, mine = tmp_path / "data.jsonl", tmp_path / "mine.jsonl"
    data.write_text('{"image": "a.png", "prefix": "q", "suffix": "y"}\n' * 2)
    mine.write_text(text)
    with pytest.raises(ValueError, match=error):
        load_answers(mine, data)
    with pytest.raises(ValueError, match=r"none.jsonl: no such file"):
        load_answers(tmp_path / "none.jsonl", data)


def test_answers_of_several_parts_are_collected_in_order(tmp_path):
    """An unfinished run is an error, even if the missing rows failed in another part."""

    def write(name, *rows):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    write("data.jsonl", *({"image": "a.png", "prefix": str(i)} for i in range(5)))
    data = tmp_path / "data.jsonl"
    answers = [{"image": "a.png", "prefix": str(i), "answer": "x"} for i in range(5)]
    write("answers-00000-of-00002.jsonl", *answers[:2])
    write("errors-00000-of-00002.jsonl")
    write("answers-00001-of-00002.jsonl")
    write("errors-00001-of-00002.jsonl", {"line": 3, "error": "gone", "row": {}})
    with pytest.raises(ValueError, match=r"is not finished: rows of .*data.jsonl .*--resume"):
        collect(data, tmp_path)
    write("answers-00001-of-00002.jsonl", *answers[3:])
    texts = [case.row.get("error", case.row["prefix"]) for case in collect(data, tmp_path)]
    assert texts == ["0", "1", "gone", "3", "4"]


def test_masks_are_scored_and_drawn(tmp_path):
    """Answers with the codes of the reference masks lose only what the codec loses."""
    pytest.importorskip("sklearn")
    file = resolve("tiny").codec_file
    assert file is not None
    folder, codec = dataset.write_digits(str(tmp_path), ("segment",), rows=30), load_codec(file)
    rows = [json.loads(line) for line in (folder / "segment.jsonl").read_text().splitlines()]
    masks = [Case(row | {"answer": row["suffix"]}, folder) for row in rows]
    boxes = [Case(row | {"answer": row["suffix"].split("<seg")[0]}, folder) for row in rows]
    metrics = ["mask_iou", "box_accuracy"]
    evaluation = evaluate(masks, metrics, samples=20, codec=codec, against=boxes)
    iou = evaluation.intervals["mask_iou"].value
    assert len(masks) > 15 and 0.7 < iou < 1
    assert evaluation.intervals["box_accuracy"].value == 1
    assert evaluation.differences["mask_iou"].value == iou  # a box alone has no mask
    drawings = masks[0].drawings(codec)
    assert all(objects[0].mask.shape == (112, 112) for objects in drawings.values())
    assert boxes[0].drawings(codec)["answer"][0].mask is None
    assert html(evaluation, count=2).count("data:image/jpeg") == 12
    with pytest.raises(ValueError, match=r"mask codec.*vae-oid.npz"):
        score_cases("mask_iou", masks)
