"""`evaluate --recipe tiny`: the documented figures of the embedded checkpoint."""

from __future__ import annotations

import json
import re

import pytest
from support.paths import ROOT

import paligemma_jax as pg
from paligemma_jax.tiny.evaluate import TASKS, boxes_found, evaluate_tiny, format_table


def test_each_task_is_evaluated(tmp_path):
    evaluations = evaluate_tiny(pg.load("tiny"), tmp_path, rows=6)
    assert list(evaluations) == list(TASKS)
    for task, evaluation in evaluations.items():
        assert len(evaluation.cases) == 6 or task == "segment"
        saved = json.loads((tmp_path / task / "result.json").read_text())
        assert saved == json.loads(json.dumps(evaluation.json()))
        assert (tmp_path / task / "report.html").stat().st_size > 1000
    table = format_table(evaluations).splitlines()
    found = f"{100 * boxes_found(evaluations['detect']):.1f}"
    assert re.search(rf"^detect +boxes found at 0.5 +{found}$", "\n".join(table), re.M)
    assert len(table) == 12 and len({line.index(" ", 9) for line in table}) > 1


@pytest.mark.parametrize(
    "flag,value",
    [
        *(("--data", "rows.jsonl"), ("--metric", "cider"), ("--grammar", "boxes:3")),
        *(("--beams", 2), ("--max-new-tokens", 8), ("--split", "val"), ("--cases", 3)),
    ],
)
def test_it_makes_its_own_data(command, flag, value):
    code, _, error = command("evaluate", "--recipe", "tiny", flag, value)
    assert code == 2 and f"--recipe tiny makes its own data: leave out {flag}" in error


def test_without_it_data_is_needed(command):
    code, _, error = command("evaluate", "--metric", "cider")
    assert code == 2 and "--data is missing" in error and error.count("\n") == 1


@pytest.mark.slow
def test_the_figures_are_those_of_the_documentation(command, tmp_path):
    """Of its table and, for the share of boxes that are found, of the README."""
    code, output, _ = command("evaluate", "--recipe", "tiny", "--output", tmp_path / "run")
    lines = [re.sub(" +", " ", line) for line in output.splitlines()]
    documented = (ROOT / "docs" / "evaluation.md").read_text()
    table = documented[documented.index("| exact match (`ocr`)") :].split("\n\n")[0]
    rows = re.findall(r"\| ([\d.]+) \| ([\d.]+ to [\d.]+) \|", table)
    assert code == 0 and len(rows) >= 7
    for value, ends in rows:
        assert any(line.endswith(f" {value} {ends}") for line in lines), (value, ends)
    (found,) = re.findall(r"float32 \| [\d.]+ % \| ([\d.]+) %", (ROOT / "README.md").read_text())
    assert f"detect boxes found at 0.5 {found}" in lines
