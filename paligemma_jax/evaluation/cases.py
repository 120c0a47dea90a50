"""The cases of a run, from files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from msgspec import Struct

from convert.typed_json import Count, check
from paligemma_jax.data.jsonl import ANSWER_FIELDS, DataRow, answer_field, read_jsonl, read_rows
from paligemma_jax.inference.offline_files import output_files
from paligemma_jax.metrics.cases import Case


class _Failure(Struct):
    """A line of errors.jsonl."""

    line: Count
    error: str


class _Answered(Struct):
    """The model's fields of a row that are read."""

    answer: str
    pieces: list[tuple[str, float]] | None = None


def collect(data: Path, folder: Path) -> list[Case]:
    """The rows of `data` with the answers that `predict` wrote to `folder`, in one part or several.

    A row that failed has the answer "" and its error.

    Raises:
        ValueError: The run is not finished, or a file is damaged.
    """
    errors = {
        failure.line: failure.error
        for file in output_files(folder, "errors")
        for _, failure in read_jsonl(file, _Failure)
    }
    answers = (row for file in output_files(folder, "answers") for row in _read_numbered(file))
    cases: list[Case] = []
    for number, row in read_rows(data):
        if number in errors:
            failed = {**row, "answer": "", "error": errors[number]}
            cases.append(Case(failed, data.parent, failed=True))  # type: ignore[arg-type]
            continue
        place, answered = next(answers, ("", None))
        if answered is None:
            raise ValueError(
                f"{folder} is not finished: rows of {data} have no answer yet; "
                "use --resume to answer the rest"
            )
        names = {name: answer_field(row, name) for name in ANSWER_FIELDS}
        cases.append(_make_case(answered, data.parent, names, place))
    return cases


def load_answers(file: Path, data: Path) -> list[Case]:
    """The rows of `data` with an "answer" from any source, from a JSONL file; or, where a row of
    `data` has an answer itself, with the "prediction" that `predict` writes.

    Raises:
        ValueError: An answer is missing, or the rows are not those of `data`.
    """
    given = [row for _, row in read_rows(data)]
    cases = []
    for i, (place, row) in enumerate(_read_numbered(file)):
        own = given[i] if i < len(given) else {}
        names = {
            name: other if name in own and other in row else name
            for name, other in ANSWER_FIELDS.items()
        }
        cases.append(_make_case(row, data.parent, names, place))
    originals = [Case(row, data.parent) for row in given]  # type: ignore[arg-type]
    check_same_rows(originals, cases, str(file))
    return cases


def check_same_rows(ours: Sequence[Case], theirs: Sequence[Case], name: str) -> None:
    """Raise a ValueError unless the rows of the other run, `name`, match ours in order."""
    for number, cases in enumerate(zip(ours, theirs, strict=False), 1):
        mine, other = [(case.row.get("image"), case.row.get("prefix")) for case in cases]
        if mine != other:
            raise ValueError(f"{name} has different rows: row {number} is {other}, expected {mine}")
    if len(ours) != len(theirs):
        raise ValueError(f"{name} has {len(theirs)} rows, expected {len(ours)}")


def _read_numbered(file: Path) -> Iterator[tuple[str, DataRow]]:
    for number, row in read_rows(file):
        yield f"{file}: line {number}", row


def _make_case(row: DataRow, folder: Path, names: Mapping[str, str], source: str) -> Case:
    """Make a case with the model's fields under their usual names.

    Args:
        names: The fields of the row with the model's "answer" and "pieces".
        source: The file and line, for errors.
    """
    fields = {name: row.get(field) for name, field in names.items()}
    check(fields, _Answered, source)
    return Case({**row, **fields}, folder)  # type: ignore[arg-type]
