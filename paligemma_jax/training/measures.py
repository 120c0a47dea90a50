"""Metrics of generated answers at validation, and which of them decides on the best step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import msgspec

from paligemma_jax.data.rows import Example, RowSource, error_prefix, example_at
from paligemma_jax.metrics.cases import Case
from paligemma_jax.metrics.comparison import score_cases
from paligemma_jax.metrics.registry import METRICS, metric_names
from paligemma_jax.processing.mask_codec import load_codec

# (answers, all correct answers of each) -> score; higher is better, unless it has an attribute
# `better` of "lower".
MetricFunction = Callable[[Sequence[str], Sequence[Sequence[str]]], float]

Measured = Mapping[str, float | None]  # a line of log.jsonl


@dataclass(frozen=True)
class Measure:
    """A metric of the answers to the validation rows."""

    name: str  # in log.jsonl
    score: Callable[[Sequence[Case]], float]
    better: str  # "higher" or "lower"; "" if neither is

    def __call__(self, cases: Sequence[Case]) -> float:
        """The metric of all cases. ValueError if it is not a number."""
        value = self.score(cases)
        try:
            return float(value)
        except (TypeError, ValueError):
            raise ValueError(f"metric {self.name} must return a number, got {value!r}") from None


def make_measures(
    names: Sequence[str], metrics: Sequence[str | MetricFunction], codec_file: Path | None = None
) -> list[Measure]:
    """The measures of a run.

    Args:
        names: Metrics of `config.metric`.
        metrics: More names, or functions.
        codec_file: File of the mask codec, for `mask_iou`.

    Raises:
        ValueError: A name is unknown, or there are two measures of one name.
    """
    if isinstance(metrics, str) or not isinstance(metrics, Sequence):
        raise ValueError(f"metrics must be a list of names or functions, got {metrics!r}")
    measures: list[Measure] = []
    for metric in (*names, *metrics):
        if isinstance(metric, str):
            for name in metric_names([metric]):
                score = partial(_registered_score, name, codec_file)
                measures.append(Measure(f"validation_{name}", score, METRICS[name].better))
        elif callable(metric):
            measures.append(_own_measure(metric))
        else:
            raise ValueError(f"metrics must be names or functions, got {metric!r}")
    found = [measure.name for measure in measures]
    repeated = {name for name in found if found.count(name) > 1} | {"validation_loss"} & set(found)
    if repeated:
        raise ValueError(f"metrics must have different names, got {min(repeated)} twice")
    return measures


def _registered_score(name: str, codec_file: Path | None, cases: Sequence[Case]) -> float:
    if codec_file is None or METRICS[name].compares != "mask":
        return score_cases(name, cases).value()
    return score_cases(name, cases, load_codec(codec_file)).value()


def _own_measure(function: MetricFunction) -> Measure:
    name = getattr(function, "__name__", type(function).__name__)
    better = getattr(function, "better", "higher")
    if better not in ("higher", "lower"):
        raise ValueError(f"metric {name}: better must be higher or lower, got {better!r}")

    def score(cases: Sequence[Case]) -> float:
        return function([case.answer for case in cases], [case.references for case in cases])

    return Measure(f"validation_{name}", score, better)


def make_case(
    example: Example, answer: str, pieces: Sequence[tuple[str, float]] | None = None
) -> Case:
    """A validation row with its answer."""
    row = {"suffix": example.suffix} | dict(example.row)
    image = example.images[0] if len(example.images) == 1 else list(example.images)
    row |= {"image": image, "answer": answer, "pieces": pieces}
    return Case(row, Path())  # type: ignore[arg-type]


def check_measures(measures: Sequence[Measure], rows: RowSource) -> None:
    """Score the suffixes of the validation rows, to find early what a metric cannot use.

    Raises:
        ValueError: There are no rows, or they lack what a metric compares.
    """
    if not measures:
        return
    if not len(rows):
        raise ValueError("--metric and metrics= require --validation")
    examples = [example_at(rows, i) for i in range(len(rows))]
    cases = [make_case(example, example.suffix) for example in examples]
    for measure in measures:
        with error_prefix(f"validation: {measure.name.removeprefix('validation_')}"):
            measure(cases)


@dataclass(frozen=True)
class Criterion:
    """What decides on the best step."""

    name: str = "validation_loss"
    better: str = "lower"

    def score(self, measured: Measured) -> float | None:
        """The score of a step, higher for better ones; None if it was not validated."""
        value = finite(measured.get(self.name))
        return -value if value is not None and self.better == "lower" else value

    def describe(self, score: float | None) -> str:
        """Name and value of what was scored."""
        value = -(score or 0.0) if self.better == "lower" else score
        return f"{self.name.removeprefix('validation_')} {value:.4f}"


class Metrics(msgspec.Struct):
    """What a checkpoint records beside its state."""

    validation_loss: float | None = None
    score: float | None = None  # of the criterion, higher for better steps
    checksum: int | None = None  # of the state; None in runs of older versions

    @property
    def best(self) -> float | None:
        """What the best step has most of. Older versions recorded the loss only."""
        loss = self.validation_loss
        return -loss if self.score is None and loss is not None else self.score


def finite(value: float | None) -> float | None:
    """None for what is not a number."""
    return value if value is not None and math.isfinite(value) else None


def criterion(measures: Sequence[Measure]) -> Criterion:
    """The first metric with a direction decides, else the loss."""
    first = next((measure for measure in measures if measure.better), None)
    return Criterion(first.name, first.better) if first else Criterion()
