"""Published results of the tasks, from figures.tsv.

A figure of the table is MEAN±DEVIATION, or MEAN if no deviation is published. A question mark after
it means that no second source confirmed it. Table 13 of report 2 (mean and standard deviation over
5 fine-tuning runs) is confirmed by table 15 for 3b (means) and by a second transcription of table
13 for most figures at 224 pixels; tables 2 to 8 and 11 by a second transcription; figures of the
first PaliGemma (pg1-3b) by big_vision's README.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ALL, MEAN, NOT_ENGLISH = "all", "mean", "mean-en"


@dataclass(frozen=True)
class Figure:
    """A published value, in the unit of its paper: percent, or CIDEr times 100."""

    mean: float
    deviation: float | None  # standard deviation over fine-tuning runs
    confirmed: bool  # by a second source

    @property
    def value(self) -> str:
        """The mean with its deviation, if there is one."""
        return str(self.mean) if self.deviation is None else f"{self.mean} ± {self.deviation}"

    def __str__(self) -> str:
        return f"{self.value}{'' if self.confirmed else '?'}"


@dataclass(frozen=True)
class Result:
    """Published values of one metric on one split."""

    task: str
    split: str
    of: str  # ALL rows, rows of one kind, the MEAN over kinds, or over kinds but English
    metric: str
    source: str
    figures: Mapping[str, Figure]  # by size and pixels, as in "3b-224"

    @property
    def title(self) -> str:
        """The split, with the kind of rows if it is not all of them."""
        kinds = {ALL: "", MEAN: ", mean over kinds", NOT_ENGLISH: ", mean over kinds but en"}
        return self.split + kinds.get(self.of, f", {self.of}")


def results(task: str) -> list[Result]:
    """Return the published results of a task; none for a task without."""
    return [result for result in _read() if result.task == task]


@cache
def _read() -> list[Result]:
    text = Path(__file__).with_name("figures.tsv").read_text(encoding="utf-8")
    head, *rows = (line.split("\t") for line in text.splitlines())
    found = []
    for row in rows:
        cells = dict(zip(head, row, strict=True))
        about = {name: cells.pop(name) for name in ("task", "split", "of", "metric", "source")}
        figures = {name: _figure(text) for name, text in cells.items() if text != "-"}
        found.append(Result(**about, figures=figures))
    return found


def _figure(text: str) -> Figure:
    mean, _, deviation = text.removesuffix("?").partition("±")
    return Figure(float(mean), float(deviation) if deviation else None, not text.endswith("?"))
