"""Compare an evaluation with the published results of its task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from paligemma_jax.data.recipes import RECIPES, Figure, Result, results
from paligemma_jax.data.recipes.figures import ALL, MEAN, NOT_ENGLISH
from paligemma_jax.metrics.bootstrap import Interval
from paligemma_jax.metrics.registry import METRICS
from paligemma_jax.model.config import PRESETS, PaliGemmaConfig


@dataclass(frozen=True)
class PublishedTask:
    """Which published results to compare with."""

    task: str
    size: str = ""  # of the model: 3b, 10b, 28b or pg1-3b; "" if unknown
    resolution: int = 0  # pixels; 0 if unknown
    split: str | None = None  # needed if results of several splits are published


@dataclass(frozen=True)
class ComparedResult:
    """A measured value beside the published one, both in the unit of the paper."""

    metric: str
    split: str  # with the kind of rows
    value: float
    mean: float  # published
    deviation: float | None  # published standard deviation over fine-tuning runs
    difference: float  # value - mean
    z: float | None  # difference / deviation; None without a deviation above 0
    confirmed: bool  # whether a second source confirms the published figure
    better: str  # direction of improvement: "higher", "lower" or ""
    source: str

    @property
    def figure(self) -> Figure:
        """The published value."""
        return Figure(self.mean, self.deviation, self.confirmed)

    def cells(self, marked: bool = False) -> list[str]:
        """Measured value, published value, difference and z for tables.

        Args:
            marked: Mark a published value that no second source confirms.
        """
        return [
            f"{self.value:.1f}",
            str(self.figure) if marked else self.figure.value,
            f"{self.difference:+.1f}",
            "–" if self.z is None else f"{self.z:+.1f}",
        ]

    def __str__(self) -> str:
        value, published, difference, z = self.cells()
        z = "no z" if self.z is None else f"z {z}"
        return f"{value}, published {published}: {difference}, {z}"


@dataclass(frozen=True)
class Published:
    """The published results of a task that an evaluation can be compared with."""

    task: str
    size: str
    resolution: int
    results: tuple[ComparedResult, ...]
    note: str = ""  # why there is nothing to compare, or what to bear in mind

    @property
    def title(self) -> str:
        """The task, with size and pixels of the model where they are known."""
        known = f" for {self.size} at {self.resolution} pixels" if self.size else ""
        return f"Published results of {self.task}{known}"


def published_model(config: PaliGemmaConfig) -> tuple[str, int]:
    """Return size and pixels of a published architecture, at any resolution; else "" and 0."""
    for name, preset in PRESETS.items():
        size = name.rpartition("-")[0]
        same = all(
            getattr(config.decoder, field) == getattr(preset.decoder, field)
            for field in ("model_type", "hidden_size", "num_hidden_layers")
        )
        if size and same:
            return size, config.vision.image_size
    return "", 0


def splits(task: str) -> list[str]:
    """The splits on which results of a task are published."""
    return list(dict.fromkeys(result.split for result in results(task)))


def compare_published(
    about: PublishedTask,
    intervals: Mapping[str, Interval],
    types: Mapping[str, Mapping[str, Interval]],
    kinds: Sequence[str],
) -> Published:
    """Compare measured metrics with the published results of a task.

    Args:
        about: The task, the model and the split.
        intervals: The value of each metric over all rows.
        types: The same by kind of question, if there are several.
        kinds: All kinds of the rows.
    """

    def nothing(reason: str) -> Published:
        return Published(about.task, about.size, about.resolution, (), reason)

    found, choices = results(about.task), splits(about.task)
    if not found:
        return nothing(f"no results of {about.task} are published")
    if not about.size or not about.resolution:
        return nothing("the model is of no published size: --size and --resolution can name one")
    if about.split is None and len(choices) > 1:
        return nothing(f"several splits have published results: pass --split {choices[0]!r}")
    model = f"{about.size}-{about.resolution}"
    found = [r for r in found if r.split == (about.split or choices[0]) and model in r.figures]
    if not found:
        return nothing(f"no results are published for {about.size} at {about.resolution} pixels")
    compared = []
    for result in found:
        value = _measured(result, intervals, types, kinds)
        if value is not None:
            compared.append(_compare(result, result.figures[model], value))
    if not compared:
        needs = ", ".join(f"{result.metric} ({result.title})" for result in found)
        return nothing(f"the rows or metrics are not those of the published results: {needs}")
    note = RECIPES[about.task].note
    return Published(about.task, about.size, about.resolution, tuple(compared), note)


def _measured(
    result: Result,
    intervals: Mapping[str, Interval],
    types: Mapping[str, Mapping[str, Interval]],
    kinds: Sequence[str],
) -> float | None:
    """The value that was measured for a published result, if it was, in the unit of the paper."""
    if result.metric not in intervals:
        return None
    overall = intervals[result.metric].value
    by_kind = {kind: each.value for kind, each in types.get(result.metric, {}).items()}
    if len(kinds) == 1:  # then the value of the kind is that of all rows
        by_kind = {kinds[0]: overall}
    value = overall if result.of == ALL else _of_kinds(by_kind, result.of)
    if value is None or np.isnan(value):
        return None
    return value * (100 if METRICS[result.metric].percent else 1)


def _of_kinds(kinds: Mapping[str, float], of: str) -> float | None:
    if of not in (MEAN, NOT_ENGLISH):
        return kinds.get(of)
    values = [value for kind, value in kinds.items() if of == MEAN or kind != "en"]
    return float(np.mean(values)) if values else None


def _compare(result: Result, figure: Figure, value: float) -> ComparedResult:
    difference = value - figure.mean
    return ComparedResult(
        metric=result.metric,
        split=result.title,
        value=round(value, 4),
        mean=figure.mean,
        deviation=figure.deviation,
        difference=round(difference, 4),
        z=round(difference / figure.deviation, 4) if figure.deviation else None,
        confirmed=figure.confirmed,
        better=METRICS[result.metric].better,
        source=result.source,
    )
