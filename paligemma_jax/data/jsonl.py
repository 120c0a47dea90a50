"""Read JSON Lines: one JSON object per line, blank lines allowed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Required, TypedDict


class DataRow(TypedDict, total=False):
    """A row of a data set, of a file of answers or of a converted data set.

    Every command reads some of these fields. A row may have others; they are copied to the output.
    """

    image: Required[str | list[str]]  # paths, relative to the file of the row
    prefix: Required[str]  # the prompt
    suffix: str  # the answer to learn, and the reference if there is no other
    weight: float  # of the row's loss in training
    answers: list[str]  # reference answers
    boxes: Sequence[Sequence[float]]  # reference boxes: left, top, right, bottom in pixels
    labels: list[str]  # of the boxes
    mask: str  # path of the reference mask, an image
    id: int | str
    type: str  # the kind of question
    question_type: str
    object: int  # RefCOCO: id of the object that the prompt refers to
    answer: str  # the model's answer
    score: float  # log-probability of the answer
    pieces: list[tuple[str, float]]  # text and log-probability of each token of the answer
    error: str  # why there is no answer


def read_lines(file: str | Path) -> Iterator[tuple[int, bytes]]:
    """Yield the lines that are not blank, one at a time, with their numbers from 1.

    Raises:
        ValueError: There is no such file.
    """
    if not Path(file).is_file():
        raise ValueError(f"{file}: no such file; expected JSONL, one JSON object per line")
    with Path(file).open("rb") as lines:
        yield from ((number, line) for number, line in enumerate(lines, 1) if line.strip())


def parse_line(line: bytes) -> object:
    """Decode one line. A byte order mark is skipped.

    Raises:
        ValueError: The line is not JSON.
    """
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error})") from None


def read_jsonl(file: str | Path) -> Iterator[tuple[int, DataRow]]:
    """Yield the objects of a file, one at a time, with their line numbers.

    Raises:
        ValueError: There is no such file, or a line is not a JSON object.
    """
    for number, line in read_lines(file):
        try:
            row = parse_line(line)
        except ValueError as error:
            raise ValueError(f"{file}: line {number}: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{file}: line {number}: not a JSON object")
        yield number, row  # type: ignore[misc]
