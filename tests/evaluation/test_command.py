"""`paligemma-jax evaluate` on digits that the embedded checkpoint was not trained on."""

import json
import sys
from dataclasses import replace

import pytest

import paligemma_jax as pg
from paligemma_jax.checkpoints.source import resolve
from paligemma_jax.evaluation.cases import collect
from paligemma_jax.evaluation.evaluate import evaluate
from paligemma_jax.evaluation.html import html
from paligemma_jax.inference.offline import predict
from paligemma_jax.inference.options import DecodingOptions
from paligemma_jax.metrics.registry import METRICS
from paligemma_jax.tiny import dataset


def test_missing_files_are_reported_before_a_model_is_loaded(command, tmp_path, monkeypatch):
    monkeypatch.setattr("paligemma_jax.inference.loading.load", None)
    no_codec = replace(resolve("tiny"), codec_file=None)
    monkeypatch.setattr("paligemma_jax.checkpoints.source.resolve", lambda *_, **__: no_codec)
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics.bleu", None)
    data = tmp_path / "data.jsonl"
    data.write_text("{}\n")

    def run(*options):
        code, _, error = command(*options, "--output", tmp_path / "out")
        assert code == 2
        return error

    missing = "paligemma-jax: --data none.jsonl: no such file\n"
    assert run("predict", "--data", "none.jsonl") == missing
    assert run("evaluate", "--data", "none.jsonl", "--metric", "anls") == missing
    error = run("evaluate", "--data", data, "--metric", "bleu")
    assert "pip install 'paligemma-jax[eval]'" in error
    assert "mask codec" in run("evaluate", "--data", data, "--metric", "mask_iou")
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    pytest.importorskip("sklearn")
    folder = str(tmp_path_factory.mktemp("held-out"))
    return dataset.write_digits(folder, ("ocr", "detect"), rows=60)


@pytest.fixture
def run(command, held_out, monkeypatch):
    """Run `paligemma-jax evaluate` on the held-out digits; returns its output, or its error."""
    monkeypatch.chdir(held_out)

    def evaluated(*arguments, fails=False):
        code, out, error = command("evaluate", "--data", "ocr.jsonl", *arguments)
        assert code == (2 if fails else 0), error
        return error if fails else out

    return evaluated


def test_the_command_evaluates_compares_and_resumes(held_out, run):
    data = held_out / "ocr.jsonl"
    lines = data.read_text().splitlines()
    broken = lines[20].replace("ocr-20.png", "gone.png")
    data.write_text("\n".join([*lines[:20], broken, "", *lines[21:]]) + "\n")
    metrics = ("--metric", "exact_match", "bleu")
    greedy = (*metrics, "--max-new-tokens", "8", "--output", "greedy")
    summary = run(*greedy)
    result = json.loads((held_out / "greedy" / "result.json").read_text())
    assert result["failed"] == 1 and result["cases"] == 60
    assert 0.5 < result["metrics"]["exact_match"]["value"] < 1
    assert "exact match: " in summary and "1 failed: greedy/report.html" in summary
    kinds = ["1 digit", "2 digits", "3 digits", "4 digits"]
    assert sorted(result["types"]["exact_match"]) == kinds
    scores = (held_out / "greedy" / "scores.jsonl").read_text().splitlines()
    assert json.loads(scores[20])["exact_match"] == 0  # the row that failed

    answers = held_out / "greedy" / "answers.jsonl"
    worse = [json.loads(line) | {"answer": "0"} for line in answers.read_text().splitlines()]
    suffix = json.loads(lines[20])["suffix"]
    failed = {"image": "gone.png", "prefix": "ocr", "suffix": suffix, "answer": "0"}
    worse.insert(20, failed)
    (held_out / "worse.jsonl").write_text("".join(json.dumps(row) + "\n" for row in worse))
    against = (*metrics, "--answers", "worse.jsonl", "--against", "greedy")
    change = json.loads(run(*against, "--output", "worse", "--json"))["differences"]["exact_match"]
    assert change["high"] < -0.3 and change["p"] < 0.01

    assert "--resume to continue" in run(*greedy, fails=True)
    two_processes = (*metrics, "--output", "two", "--hosts", "localhost:1,2,0")
    assert "evaluate runs in one process, got 2: run predict" in run(*two_processes, fails=True)
    complete = answers.read_text()
    answers.write_text("".join(complete.splitlines(keepends=True)[:30]))
    assert "greedy is not finished" in run(*against, "--output", "again", fails=True)
    assert run(*greedy, "--resume") and answers.read_text() == complete
    assert "--metric must be one of" in run("--metric", "nonsense", fails=True)
    assert "--bootstrap must be at least 1, got 0" in run(*metrics, "--bootstrap", "0", fails=True)


def test_scores_of_boxes_raise_ap(held_out, tmp_path):
    """AP is higher with the probabilities of the answers' tokens than with one score for all."""
    options = DecodingOptions(48)
    predict(pg.load("tiny"), held_out / "detect.jsonl", tmp_path, options, pieces=True)
    cases = collect(held_out / "detect.jsonl", tmp_path)
    predictions = [case.detections for case in cases]
    references = [case.reference_detections for case in cases]
    assert any(len(objects) > 1 for objects in predictions)
    assert all(0 < item.score < 1 for objects in predictions for item in objects)
    constant = [[replace(item, score=0.5) for item in objects] for objects in predictions]
    ap = METRICS["average_precision"]
    assert ap(predictions, references) > ap(constant, references) > 0.5
    page = html(evaluate(cases, ["coco"], samples=20))
    assert page.count("data:image/jpeg") >= 24 and "AP50" in page
