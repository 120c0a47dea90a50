"""Standard streams that are closed, full or no longer read: no traceback, and the work is done."""

from __future__ import annotations

import subprocess
import sys

import pytest
from support.paths import ROOT

# Reports progress, warns, prints a result, and proves at the end that it got there.
WORK = """
import sys, warnings
from pathlib import Path
from paligemma_jax.errors import report_errors

def work():
    from paligemma_jax.data.progress import progress_bar

    for _ in progress_bar(range(3), "rows", show=True, interval=0):
        pass
    warnings.warn("look here")
    print("result\\n" * 10_000, end="")
    print("note", file=sys.stderr)
    Path(sys.argv[1]).touch()

report_errors(work)
"""
FAKE = [sys.executable, "-c", WORK]
INSPECT = [sys.executable, "-m", "paligemma_jax", "convert", "inspect", "paligemma_jax/assets/tiny"]


def run(command: list[str], redirection: str) -> tuple[int, str, str]:
    """Exit code (of the command, not of `head`), stdout and stderr."""
    script = f'set -o pipefail; "$@" {redirection}'
    done = subprocess.run(
        ["bash", "-c", script, "bash", *command], capture_output=True, text=True, cwd=ROOT
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    "redirection,code,out,err",
    [
        (">&-", 0, "", "rows: 3/3"),
        ("2>&-", 0, "result\n", ""),
        (">&- 2>&-", 0, "", ""),
        ("2> >(exec true)", 0, "result\n", ""),
        ("2>/dev/full", 0, "result\n", ""),
        ("| head -1", 0, "result\n", "rows: 3/3"),
        (">/dev/full", 2, "", "No space left on device"),
    ],
)
def test_work_survives_streams_that_cannot_be_written(redirection, code, out, err, tmp_path):
    exit_code, output, errors = run([*FAKE, str(tmp_path / "done")], redirection)
    assert exit_code == code, errors
    assert out in output and err in errors
    assert "Traceback" not in errors and "Exception ignored" not in errors
    if code == 0 and "head" not in redirection:
        assert (tmp_path / "done").exists()


def test_a_warning_is_one_line(tmp_path):
    _, _, errors = run([*FAKE, str(tmp_path / "done")], "")
    assert "paligemma-jax: look here\n" in errors


@pytest.mark.parametrize("redirection", [">&- 2>&-", "| head -1"])
def test_a_command_without_streams(redirection):
    code, _, errors = run(INSPECT, redirection)
    assert (code, errors) == (0, "")
