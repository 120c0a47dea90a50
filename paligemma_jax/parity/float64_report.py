"""What a report tells of float64: two columns and a closing line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from paligemma_jax.parity.compare import StageError

Cell = TypeVar("Cell")

NOTE = """\
From float64: the accumulated relative error of each model against this model in float64, on the
same weights and inputs."""
COLUMNS = ("ours from float64", "transformers from float64")
# The terminal has no room for these columns beside the two.
LEFT_OUT = {"float32": (1, 3), "ratio": (3, 7)}


def numbers(row: StageError) -> list[float | None]:
    """The numbers of the two columns."""
    errors = row.ours_from_float64, row.transformers_from_float64
    return [error.relative if error else None for error in errors]


def make_room(cells: Sequence[Cell], by_ratio: bool) -> list[Cell]:
    """The cells of a line in the terminal that stay beside the two columns."""
    left_out = LEFT_OUT["ratio" if by_ratio else "float32"]
    return [cell for i, cell in enumerate(cells) if i not in left_out]


def verdict(rows: list[StageError]) -> str | None:
    """State which model's logits are closer to float64. None if it was not computed."""
    row = next((row for row in rows if row.stage == "logits"), None)
    if row is None or row.float64_ratio is None:
        return None
    ours, theirs = numbers(row)
    return (
        f"logits: ours is {row.float64_ratio:.2f} times as far from float64 as transformers "
        f"({ours:.1e} and {theirs:.1e})"
    )
