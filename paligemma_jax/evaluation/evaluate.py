"""Figures of a run over a data set: each metric with its interval, by kind of question, and against another run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from paligemma_jax.evaluation.cases import METRICS, Case, metric_names, same_rows, score_cases
from paligemma_jax.metrics.bootstrap import Difference, Interval, difference, interval
from paligemma_jax.processing.mask_codec import MaskCodec


@dataclass(frozen=True)
class Evaluation:
    about: dict[str, str]  # "model", "data", "against", ... as the report tells them
    cases: Sequence[Case]
    figures: dict[str, Interval]  # by metric; so are the others
    each: dict[str, np.ndarray]  # float64[N]
    types: dict[str, dict[str, Interval]] = field(default_factory=dict)  # by metric, then by kind of question
    differences: dict[str, Difference] = field(default_factory=dict)
    others: Sequence[Case] = ()  # of the run that this is held against
    changes: dict[str, np.ndarray] = field(default_factory=dict)  # float64[N]: ours less theirs
    codec: MaskCodec | None = None  # to draw masks with

    @property
    def failed(self) -> int:
        return sum("error" in case.row for case in self.cases)

    def json(self) -> dict[str, Any]:
        """Values as metrics give them; papers print those with "percent" times 100."""
        told = lambda one: {key: None if np.isnan(value) else value for key, value in asdict(one).items()}
        flat = lambda found: {name: told(one) for name, one in found.items()}
        result: dict[str, Any] = {**self.about, "cases": len(self.cases), "failed": self.failed}
        result["metrics"] = {name: {**told(one), "percent": METRICS[name].percent} for name, one in self.figures.items()}
        result |= {"types": {name: flat(kinds) for name, kinds in self.types.items()}} if self.types else {}
        return result | ({"differences": flat(self.differences)} if self.differences else {})

    def save(self, folder: str | Path) -> None:
        """result.json, and scores.jsonl with what each case has under each metric."""
        (Path(folder) / "result.json").write_text(json.dumps(self.json(), ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
        with (Path(folder) / "scores.jsonl").open("w", encoding="utf-8") as out:
            for i, case in enumerate(self.cases):
                about = {key: case.row[key] for key in ("id", "image", "prefix", "answer") if key in case.row}
                out.write(json.dumps(about | {name: round(float(each[i]), 6) for name, each in self.each.items()}, ensure_ascii=False) + "\n")


def evaluate(
    cases: Sequence[Case],
    metrics: Sequence[str],
    *,
    by: str = "type",
    samples: int = 1000,
    codec: MaskCodec | None = None,
    against: Sequence[Case] = (),
    about: dict[str, str] | None = None,
) -> Evaluation:
    """metrics: names of `cases.METRICS` or `cases.GROUPS`. by: the field of a row that tells its kind. samples: of the bootstrap.

    against: the same rows answered by another run. ValueError if rows lack what a metric compares with, or are others.
    """
    wanted = metric_names(metrics)
    if against:
        same_rows(cases, against, "--against")
    scores = {name: score_cases(name, cases, codec) for name in wanted}
    kinds: dict[str, list[int]] = {}
    for i, case in enumerate(cases):
        if case.row.get(by) is not None:
            kinds.setdefault(str(case.row[by]), []).append(i)
    figures, types, differences, changes = {}, {}, {}, {}
    for name in tqdm(wanted, "bootstrap", unit="metric", disable=None, leave=False):
        figures[name] = interval(scores[name], samples)
        if len(kinds) > 1:
            types[name] = {kind: interval(scores[name], samples, members=members) for kind, members in sorted(kinds.items())}
        if against:
            theirs = score_cases(name, against, codec)
            differences[name], changes[name] = difference(scores[name], theirs, samples), scores[name].each - theirs.each
    each = {name: one.each for name, one in scores.items()}
    return Evaluation(about or {}, cases, figures, each, types, differences, against, changes, codec)
