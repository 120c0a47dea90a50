"""From answers to a report: intervals that hold, comparisons, and `paligemma-jax evaluate` on digits that the checkpoint never saw."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

import paligemma_jax as pg
from paligemma_jax.checkpoints.source import resolve
from paligemma_jax.evaluation import report
from paligemma_jax.evaluation.cases import Case, collect, load, metric_names, score_cases
from paligemma_jax.evaluation.evaluate import evaluate
from paligemma_jax.inference.offline import predict
from paligemma_jax.metrics import registry
from paligemma_jax.metrics.bootstrap import difference, interval
from paligemma_jax.metrics.scores import mean
from paligemma_jax.processing.mask_codec import load_codec
from paligemma_jax.tiny import dataset

# ---- Intervals


def test_intervals_hold_the_truth_95_times_in_100():
    rng = np.random.default_rng(0)
    runs = [interval(mean(rng.random(80) < 0.7), samples=200, seed=i) for i in range(300)]
    assert 0.9 < np.mean([run.low <= 0.7 <= run.high for run in runs]) < 0.98
    assert all(run.low <= run.value <= run.high for run in runs)


def test_pairs_show_what_single_runs_hide():
    """Two runs that are both right on 70 to 74 of 100 cases, of which four were won and none lost."""
    rng = np.random.default_rng(0)
    theirs = rng.random(100) < 0.7
    ours = theirs.copy()
    ours[np.flatnonzero(~theirs)[:8]] = True
    one, other = interval(mean(ours)), interval(mean(theirs))
    assert one.low < other.high  # by themselves they cannot be told apart
    found = difference(mean(ours), mean(theirs))
    assert found.value == pytest.approx(0.08) and found.low > 0 and found.p < 0.01
    back = difference(mean(theirs), mean(ours))
    assert back.value == -found.value and back.high < 0 and back.p == found.p
    assert difference(mean(ours), mean(ours)).p == 1


def test_chance_alone_is_seldom_taken_for_a_difference():
    rng = np.random.default_rng(1)
    found = [difference(mean(rng.random(60)), mean(rng.random(60)), samples=200, seed=i).p for i in range(200)]
    assert 0.01 < np.mean(np.array(found) < 0.05) < 0.1


def test_a_kind_of_question_is_resampled_among_its_own():
    scores = mean([1.0] * 50 + [0.0] * 50)
    found = interval(scores, members=range(50))
    assert (found.value, found.low, found.high) == (1, 1, 1)
    mixed = interval(scores, members=range(40, 60))
    assert mixed.value == 0.5 and mixed.low < 0.4 and mixed.high > 0.6


# ---- Cases and reports, of answers as they are


@pytest.fixture
def photo(tmp_path):
    Image.new("RGB", (100, 50), "teal").save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def rows(answers, **more):
    return [
        {"image": "photo.png", "prefix": "q", "suffix": "yes", "answer": answer} | {key: value[i] for key, value in more.items()}
        for i, answer in enumerate(answers)
    ]


def cases(folder, *args, **more):
    return [Case(row, folder) for row in rows(*args, **more)]


def test_what_is_right_comes_from_the_row(photo, tmp_path):
    plain = Case(
        {"image": "photo.png", "suffix": "<loc0000><loc0000><loc1023><loc0512> cat", "answer": "<loc0000><loc0000><loc1023><loc1023> cat"}, tmp_path
    )
    assert plain.right == [plain.row["suffix"]] and plain.size == (100, 50)
    assert plain.wanted[0].box == pytest.approx((0, 0, 50.05, 50), abs=0.01) and plain.found[0].score is None
    exact = Case(plain.row | {"boxes": [[1, 2, 30, 40]], "labels": ["dog"], "answers": ["a", "b"]}, tmp_path)
    assert exact.wanted[0].box == (1, 2, 30, 40) and exact.wanted[0].label == "dog" and exact.right == ["a", "b"]
    sure = Case(plain.row | {"pieces": [[f"<loc{n:04}>", -0.5] for n in (0, 0, 1023, 1023)] + [[" cat", -0.5], ["", -9]]}, tmp_path)
    assert sure.found[0].score == pytest.approx(np.exp(-0.5)) and sure.found[0].label == "cat"
    with pytest.raises(ValueError, match="neither answers nor suffix"):
        _ = Case({"image": "photo.png"}, tmp_path).right


def test_boxes_are_scored_in_pixels(photo, tmp_path):
    answers = ["<loc0000><loc0000><loc1023><loc1023> cat", "nothing"]
    found = [Case({"image": "photo.png", "answer": answer, "boxes": [[0, 0, 50, 50]], "labels": ["cat"]}, tmp_path) for answer in answers]
    assert score_cases("box_iou", found).each.tolist() == [0.5, 0] and score_cases("box_accuracy", found).value() == 0.5
    assert score_cases("ap50", found).value() == pytest.approx(51 / 101)
    with pytest.raises(ValueError, match="no box to find"):
        score_cases("box_iou", [Case({"image": "photo.png", "answer": "", "suffix": ""}, tmp_path)])


def test_figures_kinds_and_files(photo, tmp_path):
    own = cases(tmp_path, ["yes"] * 6 + ["no"] * 4, type=["a"] * 5 + ["b"] * 5, id=list(range(10)))
    found = evaluate(own, ["exact_match", "pope"], samples=50)
    assert found.figures["exact_match"].value == 0.6 and list(found.figures)[1:] == ["pope_accuracy", "pope_f1", "pope_precision", "pope_recall"]
    assert [one.value for one in found.types["exact_match"].values()] == [1, 0.2] and not found.differences
    assert found.types["exact_match"]["b"].low < 0.2 < found.types["exact_match"]["b"].high
    found.save(tmp_path)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["metrics"]["exact_match"]["value"] == 0.6 and result["types"]["exact_match"]["b"]["value"] == 0.2 and result["cases"] == 10
    told = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert told[9] == {
        "id": 9,
        "image": "photo.png",
        "prefix": "q",
        "answer": "no",
        "exact_match": 0,
        **{f"pope_{n}": 0 for n in ("accuracy", "f1", "precision", "recall")},
    }


def test_a_report_shows_the_worst_what_changed_and_a_sample(photo, tmp_path):
    own = cases(tmp_path, ["yes"] * 8 + ["<b>no</b>"] * 2, type=["a"] * 5 + ["b"] * 5)
    others = cases(tmp_path, ["no"] + ["yes"] * 8 + ["no"], type=["a"] * 5 + ["b"] * 5)
    found = evaluate(own, ["exact_match"], samples=50, against=others, about={"model": "mine <3", "against": "theirs"})
    sections = {section.title: section.cases for section in report.sections(found, count=3)}
    assert set(sections["Worst by exact match"]) == {8, 9} and sections["Better in the other run"] == [8] and sections["Better in this run"] == [0]
    assert len(sections["A random sample"]) == 3
    page, text = report.html(found), report.markdown(found, folder=tmp_path)
    assert page.count("data:image/jpeg;base64,") == 2 + 1 + 1 + 10 and "http" not in page  # nothing else is needed to see it
    assert "mine &lt;3" in page and "&lt;b&gt;no&lt;/b&gt;" in page and "<b>no" not in page
    assert "| exact match | 80.0 |" in text and "| a | 100.0 |" in text and "[photo.png](photo.png)" in text
    photo.unlink()
    assert "no such" in report.html(found).lower() or "photo.png" in report.html(found)


def test_boxes_are_drawn_beside_those_that_are_right(photo, tmp_path):
    place = "<loc0100><loc0100><loc0900><loc0500>"
    row = {"image": "photo.png", "prefix": "detect cat", "answer": f"{place} cat"}
    own = [Case(row | {"suffix": right}, tmp_path) for right in ("", place)]
    page = report.html(evaluate(own, ["coco"], samples=10), count=1)
    assert page.count("data:image/jpeg") == 2 and "<figcaption>right" in page and "<figcaption>answered" in page
    assert f"title='{place.replace('<', '&lt;').replace('>', '&gt;')}'" in page


def test_rows_of_masks_alone_and_rows_of_nothing(photo, tmp_path):
    """A mask is drawn with the box around it; what has no box, or no such file, is told."""
    mask = np.zeros((80, 120), np.uint8)
    mask[20:40, 30:70] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    case = Case({"image": "photo.png", "prefix": "segment cat", "answer": "", "mask": "mask.png"}, tmp_path)
    (right,) = case.drawings(None)["right"]
    assert right.box == (30, 20, 70, 40) and right.mask.sum() == 20 * 40
    assert "<figcaption>right" in report.html(evaluate([case], ["mask_iou"], samples=5))
    with pytest.raises(ValueError, match=r"the row about photo.png: no mask at .*none.png"):
        evaluate([Case(case.row | {"mask": "none.png"}, tmp_path)], ["mask_iou"], samples=5)
    for wrong, told in (({"mask": 7}, '"mask" is 7'), ({"boxes": [[1, 2, 3]]}, r'"boxes" is \[\[1, 2, 3\]\]'), ({"boxes": 5}, '"boxes" is 5')):
        (tmp_path / "wrong.jsonl").write_text(json.dumps(case.row | wrong) + "\n")
        with pytest.raises(ValueError, match=f"wrong.jsonl: line 1: {told}"):
            load(tmp_path / "wrong.jsonl", tmp_path / "wrong.jsonl")
    with pytest.raises(ValueError, match="no row has a box to find"):
        evaluate(cases(tmp_path, ["yes", "no"]), ["coco"], samples=5)


def test_other_rows_are_not_compared(photo, tmp_path):
    own = cases(tmp_path, ["yes", "no"])
    with pytest.raises(ValueError, match="--against has 1 rows, not 2"):
        evaluate(own, ["exact_match"], against=own[:1])
    with pytest.raises(ValueError, match=r"row 2 is \('photo.png', 'other'\), not \('photo.png', 'q'\)"):
        evaluate(own, ["exact_match"], against=[own[0], Case(own[1].row | {"prefix": "other"}, tmp_path)])
    with pytest.raises(ValueError, match=r"--metric bleurt: there are .*cider.*, pope, coco"):
        metric_names(["bleurt"])


def test_files_of_answers(tmp_path):
    data, mine = tmp_path / "data.jsonl", tmp_path / "mine.jsonl"
    data.write_text('{"image": "a.png", "prefix": "q", "suffix": "y"}\n' * 2)
    for text, told in [
        ('{"image": "a.png", "prefix": "q", "answer": "x"}\n{"image": "a.png"}\n', "row 2 has no answer"),
        ('{"image": "a.png", "prefix": "q", "answer": "x"}\n', "mine.jsonl has 1 rows, not 2"),
        ('{"image": "b.png", "prefix": "q", "answer": "x"}\n' * 2, r"mine.jsonl is about other rows: row 1 is \('b.png', 'q'\)"),
        ("{\n", "mine.jsonl: line 1 is not JSON"),
    ]:
        mine.write_text(text)
        with pytest.raises(ValueError, match=told):
            load(mine, data)
    with pytest.raises(ValueError, match=r"none.jsonl: no such file"):
        load(tmp_path / "none.jsonl", data)


def test_answers_of_parts(tmp_path):
    """In their order, as those of one; a run that is not finished is told, where the rest has failed too."""
    (data := tmp_path / "data.jsonl").write_text("".join(json.dumps({"image": "a.png", "prefix": str(i)}) + "\n" for i in range(5)))
    write = lambda name, *rows: (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    answers = [{"image": "a.png", "prefix": str(i), "answer": "x"} for i in range(5)]
    error = {"line": 3, "error": "gone", "row": {}}
    write("answers-00000-of-00002.jsonl", *answers[:2])
    write("errors-00000-of-00002.jsonl")
    write("answers-00001-of-00002.jsonl")
    write("errors-00001-of-00002.jsonl", error)
    with pytest.raises(ValueError, match=r"is not finished, .*data.jsonl has rows without an answer yet: --resume"):
        collect(data, tmp_path)
    write("answers-00001-of-00002.jsonl", *answers[3:])
    assert [case.row.get("error", case.row["prefix"]) for case in collect(data, tmp_path)] == ["0", "1", "gone", "3", "4"]


def test_masks_are_measured_and_drawn(tmp_path):
    """Answers that say the codes of the right masks: what is lost is what the codec loses."""
    pytest.importorskip("sklearn")
    file = resolve("tiny").codec_file
    assert file is not None
    folder, codec = dataset.write_digits(str(tmp_path), ("segment",), rows=30), load_codec(file)
    rows = [json.loads(line) for line in (folder / "segment.jsonl").read_text().splitlines()]
    said = [Case(row | {"answer": row["suffix"]}, folder) for row in rows]
    silent = [Case(row | {"answer": row["suffix"].split("<seg")[0]}, folder) for row in rows]
    found = evaluate(said, ["mask_iou", "box_accuracy"], samples=20, codec=codec, against=silent)
    assert len(said) > 15 and 0.7 < found.figures["mask_iou"].value < 1 and found.figures["box_accuracy"].value == 1
    assert found.differences["mask_iou"].value == found.figures["mask_iou"].value  # a box alone is no mask
    drawings = said[0].drawings(codec)
    assert all(things[0].mask.shape == (112, 112) for things in drawings.values()) and silent[0].drawings(codec)["answered"][0].mask is None
    assert report.html(found, count=2).count("data:image/jpeg") == 12
    with pytest.raises(ValueError, match=r"no mask codec beside the checkpoint: put the published vae-oid.npz"):
        score_cases("mask_iou", said)


# ---- The command, on digits that `tiny` never saw


def test_what_is_missing_is_told_before_a_model_is_loaded(command, tmp_path, monkeypatch):
    monkeypatch.setattr("paligemma_jax.inference.loading.load", None)
    tiny = replace(resolve("tiny"), codec_file=None)
    monkeypatch.setattr("paligemma_jax.checkpoints.source.resolve", lambda reference: tiny)
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics.bleu", None)
    (data := tmp_path / "data.jsonl").write_text("{}\n")
    run = lambda *options: command(*options, "--output", tmp_path / "out")[::2]
    assert run("predict", "--data", "none.jsonl") == (2, "paligemma-jax: --data none.jsonl: no such file\n")
    assert run("evaluate", "--data", "none.jsonl", "--metric", "anls") == (2, "paligemma-jax: --data none.jsonl: no such file\n")
    assert "pip install 'paligemma-jax[eval]'" in run("evaluate", "--data", data, "--metric", "bleu")[1]
    assert "no mask codec" in run("evaluate", "--data", data, "--metric", "mask_iou")[1] and not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    pytest.importorskip("sklearn")
    return dataset.write_digits(str(tmp_path_factory.mktemp("held-out")), ("ocr", "detect"), rows=60)


@pytest.fixture
def run(command, held_out, monkeypatch):
    """`paligemma-jax evaluate` on rows about digits -> what it prints, or its error."""
    monkeypatch.chdir(held_out)

    def evaluated(*arguments, fails=False):
        code, out, err = command("evaluate", "--data", "ocr.jsonl", *arguments)
        assert code == (2 if fails else 0), err
        return err if fails else out

    return evaluated


def test_the_command_measures_compares_and_goes_on(held_out, run):
    data = held_out / "ocr.jsonl"
    lines = data.read_text().splitlines()
    data.write_text("\n".join([*lines[:20], lines[20].replace("ocr-20.png", "gone.png"), "", *lines[21:]]) + "\n")
    measure, greedy = ("--metric", "exact_match", "bleu"), ("--max-new-tokens", "8", "--output", "greedy")
    told = run(*measure, *greedy)
    result = json.loads((held_out / "greedy" / "result.json").read_text())
    assert result["failed"] == 1 and result["cases"] == 60 and 0.5 < result["metrics"]["exact_match"]["value"] < 1
    assert "exact match: " in told and "1 failed: greedy/report.html" in told
    assert sorted(result["types"]["exact_match"]) == ["1 digit", "2 digits", "3 digits", "4 digits"]
    assert json.loads((held_out / "greedy" / "scores.jsonl").read_text().splitlines()[20])["exact_match"] == 0  # what failed is not left out

    answers = held_out / "greedy" / "answers.jsonl"
    worse = [json.loads(line) | {"answer": "0"} for line in answers.read_text().splitlines()]
    worse.insert(20, {"image": "gone.png", "prefix": "ocr", "suffix": json.loads(lines[20])["suffix"], "answer": "0"})
    (held_out / "worse.jsonl").write_text("".join(json.dumps(row) + "\n" for row in worse))
    told = run(*measure, "--answers", "worse.jsonl", "--against", "greedy", "--output", "worse", "--json")
    change = json.loads(told)["differences"]["exact_match"]
    assert change["high"] < -0.3 and change["p"] < 0.01

    assert "--resume to go on" in run(*measure, *greedy, fails=True)
    assert "evaluate answers in one process, not 2: predict in" in run(*measure, "--output", "two", "--hosts", "localhost:1,2,0", fails=True)
    kept = answers.read_text()
    answers.write_text("".join(kept.splitlines(keepends=True)[:30]))
    assert "greedy is not finished" in run(*measure, "--answers", "worse.jsonl", "--against", "greedy", "--output", "again", fails=True)
    assert run(*measure, *greedy, "--resume") and answers.read_text() == kept
    assert "--metric nonsense: there are" in run("--metric", "nonsense", fails=True)


def test_scores_of_boxes_are_worth_something(held_out, tmp_path):
    """AP with the probabilities of an answer's tokens is higher than with the same score for every box."""
    predict(pg.load("tiny"), held_out / "detect.jsonl", tmp_path, 48, pieces=True)
    found = collect(held_out / "detect.jsonl", tmp_path)
    predictions, references = [case.found for case in found], [case.wanted for case in found]
    assert any(len(things) > 1 for things in predictions) and all(0 < thing.score < 1 for things in predictions for thing in things)
    constant = [[replace(thing, score=0.5) for thing in things] for things in predictions]
    ours, theirs = (registry.average_precision(side, references) for side in (predictions, constant))
    assert ours > theirs > 0.5
    page = report.html(evaluate(found, ["coco"], samples=20))
    assert page.count("data:image/jpeg") >= 24 and "AP50" in page
