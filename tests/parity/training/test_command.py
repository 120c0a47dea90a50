"""`paligemma-jax parity --train`: a run is repeated, and wrong flags are one sentence."""

from __future__ import annotations

import json

import pytest
from support.paths import GOLDEN

import paligemma_jax as pg
from paligemma_jax.tiny.dataset import write_digits
from paligemma_jax.training.runs import Run, RunContent

pytest.importorskip("torch", reason="the reference is torch: install the extra test")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_digits(str(tmp_path_factory.mktemp("rows")), ("detect",), 6) / "detect.jsonl"


def test_a_run_is_repeated(command, rows, tmp_path):
    """With its settings: the losses are those in its log."""
    config = pg.FinetuneConfig(
        data=str(rows),
        output=str(tmp_path / "run"),
        train="lora",
        lora_rank=2,
        batch_size=2,
        steps=3,
        learning_rate=1e-3,
        samples=0,
    )
    pg.finetune(config)
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").open()]
    page = tmp_path / "page.html"
    arguments = ("--run", config.output, "--json", "--html", page)
    code, output, _ = command("parity", "--train", 3, *arguments)
    report = json.loads(output)
    assert code == 0 and report["passed"] and report["config"]["lora_rank"] == 2
    ours = [loss for loss, _ in report["losses"]]
    assert ours == pytest.approx([line["loss"] for line in log], rel=1e-4)
    assert "Training parity of tiny" in page.read_text()


@pytest.mark.parametrize(
    "arguments,message",
    [
        (("--train", 0), "--train must be at least 1, got 0"),
        (("--data", "rows.jsonl"), "--run, --data and --lora need --train STEPS"),
        (("--train", 2, "--prompt", "ocr"), "--train cannot be combined with --prompt"),
        (("--train", 2, "--run", "."), ". has no run: config.json is missing"),
        (("--train", 2, "--run", ".", "--lora"), "--run cannot be combined with --lora"),
        (("--train", 2, "--model", GOLDEN / "pg2"), "--train needs --data or --run to train"),
        (("--train", 2, "--model", "3b-224", "--data", "x"), "3b-224 has random weights and no"),
        (("--train", 2, "--model", "10b-224"), "training 10b-224 twice needs"),
    ],
)
def test_wrong_flags_are_one_sentence(command, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, _, error = command("parity", *arguments)
    assert code == 2 and message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "options,message",
    [
        (dict(optimizer="muon"), "--train compares AdamW only, got --optimizer muon"),
        (dict(noise_boxes=6), "--train cannot compare runs with --noise-boxes, got 6"),
        (dict(box_order="random"), "--train cannot compare runs with --box-order, got random"),
        (dict(quantize="int8", train="lora"), "--train cannot compare runs with --quantize"),
    ],
)
def test_runs_that_are_not_compared(command, rows, tmp_path, options, message):
    config = pg.FinetuneConfig(data=str(rows), output=str(tmp_path / "run"), **options)
    Run(config, RunContent()).close()
    code, _, error = command("parity", "--train", 2, "--run", config.output)
    assert code == 2 and message in error
