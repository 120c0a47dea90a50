"""Evaluate a run on a data set: metrics with intervals, by kind, and against another run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from paligemma_jax.data.progress import progress_bar
from paligemma_jax.evaluation.cases import check_same_rows
from paligemma_jax.evaluation.published import Published, PublishedTask, compare_published
from paligemma_jax.metrics.bootstrap import Difference, Interval, difference, interval
from paligemma_jax.metrics.cases import Case
from paligemma_jax.metrics.comparison import score_cases
from paligemma_jax.metrics.registry import METRICS, metric_names
from paligemma_jax.processing.mask_codec import MaskCodec


@dataclass(frozen=True)
class Evaluation:
    """The results of a run. Dicts are keyed by metric."""

    about: dict[str, str]  # facts for the report: "model", "data", "against", ...
    cases: Sequence[Case]
    intervals: dict[str, Interval]
    scores: dict[str, np.ndarray]  # float64[N], of each case
    types: dict[str, dict[str, Interval]] = field(default_factory=dict)  # then by kind of question
    differences: dict[str, Difference] = field(default_factory=dict)
    other_cases: Sequence[Case] = ()  # of the run to compare with
    score_changes: dict[str, np.ndarray] = field(default_factory=dict)  # float64[N], ours - theirs
    codec: MaskCodec | None = None  # to draw masks
    published: Published | None = None  # the published results of the task, compared

    @property
    def failed(self) -> int:
        """The number of rows that could not be answered."""
        return sum(case.failed for case in self.cases)

    def json(self) -> dict[str, object]:
        """The results without those of individual cases, for result.json.

        Values are not scaled; papers multiply those with "percent" by 100.
        """
        result: dict[str, object] = {**self.about, "cases": len(self.cases), "failed": self.failed}
        result["metrics"] = {
            name: {**_numbers(value), "percent": METRICS[name].percent}
            for name, value in self.intervals.items()
        }
        if self.types:
            result["types"] = {
                name: {kind: _numbers(value) for kind, value in kinds.items()}
                for name, kinds in self.types.items()
            }
        if self.differences:
            result["differences"] = {n: _numbers(value) for n, value in self.differences.items()}
        if self.published:
            result["published"] = asdict(self.published)
        return result

    def save(self, folder: str | Path) -> None:
        """Write result.json, and scores.jsonl with the scores of each case."""
        text = json.dumps(self.json(), ensure_ascii=False, indent=2)
        (Path(folder) / "result.json").write_text(text + "\n", encoding="utf-8")
        with (Path(folder) / "scores.jsonl").open("w", encoding="utf-8") as out:
            for i, case in enumerate(self.cases):
                names = ("id", "image", "prefix", "answer")
                about = {name: value for name, value in case.row.items() if name in names}
                scores = {name: round(float(each[i]), 6) for name, each in self.scores.items()}
                out.write(json.dumps(about | scores, ensure_ascii=False) + "\n")


def _numbers(value: Interval) -> dict[str, float | None]:
    """Return the numbers of an interval, with None for nan, which JSON lacks."""
    return {name: None if np.isnan(number) else number for name, number in asdict(value).items()}


def evaluate(
    cases: Sequence[Case],
    metrics: Sequence[str],
    *,
    by: str = "type",
    samples: int = 1000,
    codec: MaskCodec | None = None,
    against: Sequence[Case] = (),
    about: Mapping[str, str] = {},
    published: PublishedTask | None = None,
) -> Evaluation:
    """Evaluate the answers of cases.

    Args:
        metrics: Names of metrics, or of groups of them.
        by: The field of a row with the kind of question.
        samples: Number of bootstrap resamplings.
        codec: Decodes masks, to compare and to draw them.
        against: The same rows, answered by another run.
        about: Facts for the report.
        published: The task whose published results the metrics are compared with.

    Raises:
        ValueError: A row has no reference of the kind that a metric compares, or the rows of
            `against` differ.
    """
    names = metric_names(metrics)
    if against:
        check_same_rows(cases, against, "--against")
    scores = {name: score_cases(name, cases, codec) for name in names}
    members: dict[str, list[int]] = {}
    for i, case in enumerate(cases):
        kind = case.row.get(by)
        if kind is not None:
            members.setdefault(str(kind), []).append(i)
    intervals, types, differences, changes = {}, {}, {}, {}
    for name in progress_bar(names, "bootstrap", unit="metric", leave=False):
        intervals[name] = interval(scores[name], samples)
        if len(members) > 1:
            types[name] = {
                kind: interval(scores[name], samples, members=own)
                for kind, own in sorted(members.items())
            }
        if against:
            theirs = score_cases(name, against, codec)
            differences[name] = difference(scores[name], theirs, samples)
            changes[name] = scores[name].each - theirs.each
    return Evaluation(
        about=dict(about),
        cases=cases,
        intervals=intervals,
        scores={name: score.each for name, score in scores.items()},
        types=types,
        differences=differences,
        other_cases=against,
        score_changes=changes,
        codec=codec,
        published=compare_published(published, intervals, types, sorted(members))
        if published
        else None,
    )
