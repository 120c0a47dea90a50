"""Report an evaluation as Markdown, with helpers that the HTML report shares."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from paligemma_jax.evaluation.evaluate import Evaluation
from paligemma_jax.evaluation.published import ComparedResult, Published
from paligemma_jax.metrics.bootstrap import Interval
from paligemma_jax.metrics.cases import Case
from paligemma_jax.metrics.registry import METRICS
from paligemma_jax.processing.image import ImageSource

PUBLISHED_COLUMNS = ("metric", "split", "value", "published", "difference", "z")
Z_NOTE = "z is the difference divided by the published standard deviation over fine-tuning runs."


@dataclass(frozen=True)
class Section:
    """Cases to show, by index."""

    title: str
    cases: Sequence[int]


def sections(evaluation: Evaluation, count: int = 12, seed: int = 0) -> list[Section]:
    """The worst cases, those that differ most from the other run, and a random sample.

    Cases are ranked by the first metric that has a direction of improvement, ties in random order.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(evaluation.cases))
    result = []
    ranking = [name for name in evaluation.intervals if METRICS[name].better]
    if ranking:
        metric, name = METRICS[ranking[0]], ranking[0]
        sign = -1 if metric.better == "lower" else 1
        quality = sign * evaluation.scores[name]
        worst = order[np.argsort(quality[order], kind="stable")][:count]
        worst = [int(i) for i in worst if quality[i] < quality.max()]
        result.append(Section(f"Worst by {metric.case_title}", worst))
        if evaluation.score_changes:
            change = sign * evaluation.score_changes[name]
            ranked = order[np.argsort(change[order], kind="stable")]
            worse = [int(i) for i in ranked[:count] if change[i] < 0]
            better = [int(i) for i in ranked[::-1][:count] if change[i] > 0]
            result.append(Section("Better in the other run", worse))
            result.append(Section("Better in this run", better))
    sample = [int(i) for i in rng.permutation(len(evaluation.cases))[:count]]
    result.append(Section("Random sample", sample))
    return [section for section in result if section.cases]


def format_value(name: str, value: float, sign: bool = False) -> str:
    """Format the value of a metric as in papers; nan becomes a dash.

    Args:
        name: Name of the metric.
        sign: Write a plus sign too.
    """
    if np.isnan(value):
        return "–"
    return f"{value * (100 if METRICS[name].percent else 1):{'+' if sign else ''}.1f}"


def format_interval(name: str, interval: Interval, sign: bool = False) -> str:
    """Format the ends of an interval; nan becomes an empty string."""
    if np.isnan(interval.low):
        return ""
    low, high = format_value(name, interval.low, sign), format_value(name, interval.high, sign)
    return f"{low} to {high}"


def reference_text(case: Case) -> str:
    """All reference answers, if there are any."""
    return " · ".join(dict.fromkeys(case.references)) if case.has_text else ""


def markdown(
    evaluation: Evaluation, count: int = 12, seed: int = 0, folder: str | Path = "."
) -> str:
    """Return the report as Markdown. Images are links, relative to `folder`."""
    lines = [f"# {evaluation.about.get('model', 'Evaluation')}", ""]
    lines += [f"- {key}: {value}" for key, value in evaluation.about.items() if key != "model"]
    failed = f", {evaluation.failed} failed" if evaluation.failed else ""
    lines += [f"- cases: {len(evaluation.cases)}{failed}", ""]
    lines += _table("metric", "value", "95 %", "against", "95 %", "p")
    for name, interval in evaluation.intervals.items():
        row = [METRICS[name].title, *_value_cells(name, interval)]
        change = evaluation.differences.get(name)
        if change:
            row += [*_value_cells(name, change, sign=True), f"{change.p:.3f}"]
        lines.append(_row(*row, *[""] * (6 - len(row))))
    for name, kinds in evaluation.types.items():
        lines += ["", f"## {METRICS[name].title} by {evaluation.about.get('by', 'type')}", ""]
        lines += _table("kind", "value", "95 %")
        lines += [_row(kind, *_value_cells(name, interval)) for kind, interval in kinds.items()]
    if evaluation.published:
        lines += ["", *_published(evaluation.published)]
    for section in sections(evaluation, count, seed):
        lines += ["", f"## {section.title}", ""]
        lines += _table("image", "prompt", "answer", "reference", "score")
        lines += [_case_row(evaluation, i, Path(folder)) for i in section.cases]
    return "\n".join(lines) + "\n"


def published_cells(result: ComparedResult) -> list[str]:
    """Metric, split, measured value, published value, difference and z, as text."""
    return [METRICS[result.metric].title, result.split, *result.cells()]


def _published(published: Published) -> list[str]:
    lines = [f"## {published.title}", ""]
    if published.results:
        lines += _table(*PUBLISHED_COLUMNS)
        lines += [_row(*published_cells(result)) for result in published.results]
        lines.append("")
    notes = [Z_NOTE] if published.results else []
    return [*lines, " ".join([*notes, published.note])]


def _case_row(evaluation: Evaluation, index: int, folder: Path) -> str:
    case = evaluation.cases[index]
    links = [_link(image, folder) for image in case.images]
    scores = [format_value(n, float(each[index])) for n, each in evaluation.scores.items()]
    texts = (case.row.get("prefix") or "", case.answer, reference_text(case))
    return _row(" ".join(links), *texts, ", ".join(scores))


def _link(image: ImageSource, folder: Path) -> str:
    """A link to a file, relative to `folder`; of an image that is not a file, its type."""
    if not isinstance(image, str | Path):
        return type(image).__name__
    return f"[{Path(image).name}]({Path(os.path.relpath(image, folder)).as_posix()})"


def _value_cells(name: str, interval: Interval, sign: bool = False) -> tuple[str, str]:
    return format_value(name, interval.value, sign), format_interval(name, interval, sign)


def _table(*columns: str) -> list[str]:
    return [_row(*columns), "|" + "---|" * len(columns)]


def _row(*cells: str) -> str:
    plain = (cell.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;") for cell in cells)
    return f"| {' | '.join(plain)} |"
