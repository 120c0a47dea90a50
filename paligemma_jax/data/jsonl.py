"""Read JSON Lines: one JSON object per line, blank lines allowed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Required, TypedDict, TypeVar

from convert.typed_json import JsonObject, check, decode

Item = TypeVar("Item")


class DataRow(TypedDict, total=False):
    """The fields of a row that are read. null counts as absent.

    A row may have others, of any type; they are copied to the output.
    """

    image: Required[str | list[str]]  # paths, relative to the file of the row
    prefix: str | None  # the prompt
    suffix: str | None  # the answer to learn, and the reference if there is no other
    weight: float | None  # of the row's loss in training
    answers: list[str] | str | None  # reference answers
    boxes: list[tuple[float, float, float, float]] | None  # references: left, top, right, bottom
    labels: list[str] | None  # of the boxes
    mask: str | None  # path of the reference mask, an image


# The fields that `predict` adds to a row, and their names in a row that has such a field already.
ANSWER_FIELDS = {
    "answer": "prediction",
    "score": "prediction_score",  # log-probability
    "pieces": "prediction_pieces",  # text and log-probability of each token
}


def answer_field(row: Mapping[str, object], name: str) -> str:
    """Return the field of a row for the model's "answer", "score" or "pieces".

    Raises:
        ValueError: The row has fields of both names.
    """
    if name not in row:
        return name
    other = ANSWER_FIELDS[name]
    if other in row:
        raise ValueError(
            f"a row with a field {name} must not have a field {other}, to which the model's {name} "
            "is written: rename one of them"
        )
    return other


def read_lines(file: str | Path) -> Iterator[tuple[int, bytes]]:
    """Yield the lines that are not blank, one at a time, with their numbers from 1.

    Raises:
        ValueError: There is no such file.
    """
    if not Path(file).is_file():
        raise ValueError(f"{file}: no such file; expected JSONL, one JSON object per line")
    with Path(file).open("rb") as lines:
        yield from ((number, line) for number, line in enumerate(lines, 1) if line.strip())


def read_jsonl(file: str | Path, kind: type[Item] = JsonObject) -> Iterator[tuple[int, Item]]:
    """Yield the objects of a file, one at a time, with their line numbers.

    Args:
        kind: The type of an object; see `convert.typed_json`.

    Raises:
        ValueError: There is no such file, or a line is not a JSON object of this type.
    """
    for number, line in read_lines(file):
        yield number, decode(line, kind, f"{file}: line {number}")


def read_rows(file: str | Path) -> Iterator[tuple[int, DataRow]]:
    """Yield the rows of a file, with all their fields, and their line numbers.

    Raises:
        ValueError: There is no such file, or a line is not a `DataRow`.
    """
    for number, row in read_jsonl(file):
        check(row, DataRow, f"{file}: line {number}")
        yield number, row  # type: ignore[misc]
