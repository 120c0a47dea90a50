"""Progress on a terminal, in a log file, and in several processes."""

from __future__ import annotations

import io
import re
import sys
import time

import jax
import pytest
from tqdm import tqdm

from paligemma_jax.data.progress import progress_bar


@pytest.fixture
def clock(monkeypatch):
    """A clock that advances only by `clock(seconds)`."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def advance(seconds):
        now[0] += seconds

    return advance


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_log_gets_a_line_at_the_start_every_interval_and_at_the_end(clock, capsys):
    with progress_bar(total=100, desc="finetune", interval=30) as bar:
        for n in range(1, 101):
            clock(20 if n == 1 else 1)  # the first update takes longer: it compiles
            bar.set_postfix(step=n, loss=f"{1 / n:.4f}", learning_rate=2e-5)
            bar.update()
    lines = capsys.readouterr().err.splitlines()
    counts = [re.match(r"finetune: (\d+)/100, step=(\d+), loss=", line).groups() for line in lines]
    assert counts == [(str(n), str(n)) for n in (1, 31, 61, 91, 100)]
    assert lines[1] == (
        "finetune: 31/100, step=31, loss=0.0323, learning_rate=2e-5"
        " [00:50 elapsed, 01:09 left, 1.00row/s]"
    )
    assert lines[-1].endswith("[01:59 elapsed, 00:00 left, 1.00row/s]")


def test_a_resumed_run_counts_from_where_it_was(clock, capsys):
    with progress_bar(total=10, initial=6) as bar:
        for _ in range(4):
            clock(2)
            bar.update()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[0] for line in lines] == ["7/10", "10/10"]
    assert "00:06 left, 0.50row/s" in lines[0]


def test_iterating_counts_the_items(clock, capsys):
    assert list(progress_bar("abc", "letters", unit="letter")) == ["a", "b", "c"]
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" [")[0] for line in lines] == ["letters: 1/3", "letters: 3/3"]


def test_a_short_passing_bar_writes_nothing_to_a_log(clock, capsys):
    for seconds, expected in ((5, 0), (40, 1)):
        for _ in progress_bar(range(10), leave=False):
            clock(seconds / 10)
        assert len(capsys.readouterr().err.splitlines()) == expected


def test_without_a_total_and_with_scaled_units(clock, capsys):
    with progress_bar(desc="copy", unit="B", unit_scale=True) as bar:
        bar.update(1_500_000)
        clock(1)
        bar.update(500_000)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("copy: 1.50M/?") and lines[1].startswith("copy: 2.00M/?")
    assert "500kB/s" in lines[1]


def test_a_terminal_gets_a_tqdm_bar(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with progress_bar(total=2, desc="rows") as bar:
        assert isinstance(bar, tqdm)
        bar.update(2)
    assert "100%|" in sys.stderr.getvalue() and "\r" in sys.stderr.getvalue()


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
@pytest.mark.parametrize(
    "show,process,shown", [(None, 0, 1), (None, 1, 0), (True, 1, 1), (False, 0, 0)]
)
def test_only_the_first_process_reports(monkeypatch, stream, show, process, shown):
    monkeypatch.setattr(sys, "stderr", stream())
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(jax, "process_index", lambda: process)
    for _ in progress_bar(range(3), show=show):
        pass
    assert bool(sys.stderr.getvalue()) == shown
