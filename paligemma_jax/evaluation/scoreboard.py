"""All evaluations of a directory beside the published results of their tasks."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from msgspec import Struct

from convert.typed_json import Count, load_json
from paligemma_jax.data.recipes import RECIPES
from paligemma_jax.evaluation.published import ComparedResult, Published
from paligemma_jax.metrics.registry import METRICS


class _ResultFile(Struct):
    """The fields of a result.json that are read."""

    model: str
    cases: Count
    published: Published | None = None


@dataclass(frozen=True)
class Entry:
    """One measured result with its published one."""

    task: str
    size: str
    resolution: int
    folder: str  # of the evaluation, relative to the directory of the board
    model: str
    cases: int
    result: ComparedResult

    @property
    def title(self) -> str:
        """The metric's name in reports."""
        metric = METRICS.get(self.result.metric)
        return metric.title if metric else self.result.metric

    @property
    def verdict(self) -> str:
        """ "good" or "bad" if the result is further than 2 deviations from the published one."""
        z, better = self.result.z, self.result.better
        if z is None or abs(z) <= 2 or not better:
            return "same"
        return "good" if (z > 0) == (better == "higher") else "bad"


@dataclass(frozen=True)
class Board:
    """The results of all evaluations, in the order of the recipes."""

    entries: tuple[Entry, ...]
    problems: tuple[str, ...]  # one sentence per evaluation that has no place on the board

    @property
    def not_evaluated(self) -> list[str]:
        """Tasks without an entry."""
        evaluated = {entry.task for entry in self.entries}
        return [name for name in RECIPES if name not in evaluated]

    def json(self) -> dict[str, object]:
        entries = [
            {**{k: v for k, v in asdict(entry).items() if k != "result"}, **asdict(entry.result)}
            for entry in self.entries
        ]
        return {
            "results": entries,
            "problems": list(self.problems),
            "not_evaluated": self.not_evaluated,
        }


def read_board(folder: Path) -> Board:
    """Read the result.json of all evaluations in a directory and below it.

    Raises:
        ValueError: The directory does not exist, or has no evaluations.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such directory")
    runs = sorted(
        {file.parent for name in ("result.json", "answers*.jsonl") for file in folder.rglob(name)}
    )
    if not runs:
        raise ValueError(f"{folder} has no evaluations: run evaluate --recipe TASK --output there")
    entries: list[Entry] = []
    problems: list[str] = []
    for run in runs:
        try:
            entries += _read_entries(run, run.relative_to(folder).as_posix())
        except ValueError as error:
            problems.append(str(error))
    order = {name: i for i, name in enumerate(RECIPES)}
    entries.sort(key=lambda entry: (order[entry.task], entry.resolution, entry.size, entry.folder))
    return Board(tuple(entries), tuple(problems))


def _read_entries(run: Path, name: str) -> list[Entry]:
    """The entries of one evaluation; ValueError with a sentence if it has none."""
    if not (run / "result.json").exists():
        raise ValueError(f"{run} is not finished: it has answers, but no result.json")
    file = load_json(run / "result.json", _ResultFile)
    published = file.published
    if published is None:
        raise ValueError(f"{run} was not evaluated with --recipe")
    if published.task not in RECIPES:
        raise ValueError(f"{run} is of an unknown task, {published.task}")
    if not published.results:
        raise ValueError(f"{run} ({published.task}): {published.note}")
    return [
        Entry(
            published.task,
            published.size,
            published.resolution,
            name,
            file.model,
            file.cases,
            result,
        )
        for result in published.results
    ]
