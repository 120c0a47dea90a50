"""The page on detectors: its commands run in order, and make as good a detector as it says."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from support.pages import blocks, run_commands, run_python
from support.paths import ROOT

PAGE = ROOT / "docs" / "detector.md"
# The value of each flag in the fast test. Views have tests of their own.
FEW = {"rows": 4, "steps": 2, "batch-size": 2, "warmup": 1, "views": 1}


@pytest.fixture
def code(tmp_path, monkeypatch):
    """The blocks of the page, to run in an empty directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    return [block for block in blocks(PAGE) if block.language in ("bash", "python")]


def test_commands_run_with_few_rows_and_steps(code, capfd, monkeypatch):
    names: dict[str, object] = {}
    values = rf"\b({'|'.join(FEW)})([ =])\d+"  # --rows 4000, views=9
    for block in code:
        few = re.sub(values, lambda match: f"{match[1]}{match[2]}{FEW[match[1]]}", block.code)
        if block.language == "python":
            run_python(few, names)
        else:
            run_commands(few, capfd, monkeypatch)
    assert len(Path("val.jsonl").read_text().splitlines()) == FEW["rows"]
    assert len(Path("detector/log.jsonl").read_text().splitlines()) >= FEW["steps"]
    report = Path("detector-evaluation/report.html").read_text()
    assert report.count("<img") >= FEW["rows"]


@pytest.mark.slow
def test_the_detector_has_an_ap50_of_95(code, monkeypatch, capsys):
    """Trains with optimized programs, as users do, and as its commands say."""
    for name in ("JAX_DISABLE_MOST_OPTIMIZATIONS", "XLA_FLAGS"):
        monkeypatch.delenv(name, raising=False)
    names: dict[str, object] = {}
    minutes = 0.0
    for block in code:
        if block.language == "python":
            run_python(block.code, names)
            continue
        before = _user_seconds()
        subprocess.run(["bash", "-euo", "pipefail", "-c", block.code], check=True)
        if "paligemma-jax finetune" in block.code:
            minutes = (_user_seconds() - before) / 60
    folder = Path("detector-evaluation")
    metrics = json.loads((folder / "result.json").read_text())["metrics"]
    ap, ap50, ap75 = (metrics[name]["value"] for name in ("average_precision", "ap50", "ap75"))
    malformed = _malformed(folder / "answers.jsonl")
    with capsys.disabled():
        print(
            f"\nAP {ap:.1%}, AP50 {ap50:.1%}, AP75 {ap75:.1%}, {malformed} malformed parts of "
            f"answers, {minutes:.1f} CPU minutes of training"
        )
    assert ap50 >= 0.95


def _user_seconds() -> float:
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime


def _malformed(answers: Path) -> int:
    """How many parts of the answers are no valid box."""
    from paligemma_jax.processing.locations import parse_detections

    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    return sum(len(parse_detections(row["answer"], (1, 1)).skipped) for row in rows)
