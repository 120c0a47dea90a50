"""Evaluations, their files and their reports."""

import json

import pytest

from paligemma_jax.evaluation.evaluate import evaluate
from paligemma_jax.evaluation.html import html
from paligemma_jax.evaluation.report import markdown, sections
from paligemma_jax.metrics.cases import Case

KINDS = ["a"] * 5 + ["b"] * 5


def test_results_by_kind_are_saved(make_cases, tmp_path):
    cases = make_cases(["yes"] * 6 + ["no"] * 4, type=KINDS, id=range(10))
    evaluation = evaluate(cases, ["exact_match", "pope"], samples=50)
    pope = ["pope_accuracy", "pope_f1", "pope_precision", "pope_recall"]
    assert evaluation.intervals["exact_match"].value == 0.6
    assert list(evaluation.intervals)[1:] == pope and not evaluation.differences
    kinds = evaluation.types["exact_match"]
    assert [interval.value for interval in kinds.values()] == [1, 0.2]
    assert kinds["b"].low < 0.2 < kinds["b"].high
    evaluation.save(tmp_path)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["metrics"]["exact_match"]["value"] == 0.6 and result["cases"] == 10
    assert result["types"]["exact_match"]["b"]["value"] == 0.2
    rows = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    about = {"id": 9, "image": "photo.png", "prefix": "q", "answer": "no"}
    assert rows[9] == about | dict.fromkeys(["exact_match", *pope], 0)


def test_intervals_of_perfect_runs_are_wilsons_everywhere(make_cases):
    """60 of 60 is not "100.0 to 100.0", in JSON and in the reports."""
    evaluation = evaluate(make_cases(["yes"] * 60), ["exact_match"], samples=50)
    low = evaluation.json()["metrics"]["exact_match"]["low"]
    assert low == pytest.approx(0.9398, abs=1e-4)
    assert "94.0 to 100.0" in html(evaluation) and "94.0 to 100.0" in markdown(evaluation)


def test_a_report_shows_the_worst_cases_changes_and_a_sample(make_cases, photo, tmp_path):
    cases = make_cases(["yes"] * 8 + ["<b>no</b>"] * 2, type=KINDS)
    others = make_cases(["no"] + ["yes"] * 8 + ["no"], type=KINDS)
    about = {"model": "mine <3", "against": "theirs"}
    evaluation = evaluate(cases, ["exact_match"], samples=50, against=others, about=about)
    shown = {section.title: section.cases for section in sections(evaluation, count=3)}
    assert set(shown["Worst by exact match"]) == {8, 9} and len(shown["Random sample"]) == 3
    assert shown["Better in the other run"] == [8] and shown["Better in this run"] == [0]
    page, text = html(evaluation), markdown(evaluation, folder=tmp_path)
    assert page.count("data:image/jpeg;base64,") == 2 + 1 + 1 + 10
    assert "http" not in page  # needs no other file
    assert "mine &lt;3" in page and "&lt;b&gt;no&lt;/b&gt;" in page and "<b>no" not in page
    assert "| exact match | 80.0 |" in text and "| a | 100.0 |" in text
    assert "[photo.png](photo.png)" in text
    assert "| image | prompt | answer | reference | score |" in text
    for name in ("prompt", "answer", "other run", "reference"):
        assert f"<dt>{name}</dt>" in page
    photo.unlink()
    assert "photo.png" in html(evaluation)


def test_empty_answers_are_named(make_cases):
    page = html(evaluate(make_cases(["", "yes"]), ["exact_match"], samples=5))
    assert "<dt>answer</dt><dd><em>(empty)</em></dd>" in page


def test_boxes_are_drawn_beside_the_reference(photo, tmp_path):
    tokens = "<loc0100><loc0100><loc0900><loc0500>"
    row = {"image": "photo.png", "prefix": "detect cat", "answer": f"{tokens} cat"}
    cases = [Case(row | {"suffix": suffix}, tmp_path) for suffix in ("", tokens)]
    page = html(evaluate(cases, ["coco"], samples=10), count=1)
    assert page.count("data:image/jpeg") == 2
    assert "<figcaption>reference" in page and "<figcaption>answer" in page
    assert f"title='{tokens.replace('<', '&lt;').replace('>', '&gt;')}'" in page
