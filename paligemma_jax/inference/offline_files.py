"""The files of an offline run, which survive being killed at any moment."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NotRequired, TypedDict

from convert.typed_json import Count, JsonObject, decode, load_json
from paligemma_jax.data.settings import check_settings


class Record(TypedDict):
    """The outcome of one row: the answered row, or an error with the original row."""

    line: Count
    error: NotRequired[str]
    row: JsonObject | str  # the text of a line that is not JSON


class OutputFiles:
    """answers.jsonl, errors.jsonl and pending.jsonl of one part of a run.

    With several parts, the file names contain -0000n-of-0000m.

    Finished batches are appended to the pending file as `Record`s. When a window of batches is
    complete, its errors are appended to the errors file, then its answered rows to the answers
    file. After a kill, the number of answers and the lines in the errors file therefore determine
    where to continue.
    """

    def __init__(self, folder: Path, part: int, parts: int):
        if not 0 <= part < parts:
            raise ValueError(f"part must be from 0 to {parts - 1}, got {part}")
        suffix = f"-{part:05}-of-{parts:05}" if parts > 1 else ""
        names = (f"{name}{suffix}.jsonl" for name in ("answers", "errors", "pending"))
        self.folder = folder
        self.answers, self.errors, self.pending = (folder / name for name in names)
        self.answered = 0
        self.failed: set[int] = set()  # line numbers
        self.waiting: dict[int, Record] = {}  # the pending file, by line number

    def begin(self, settings: dict[str, object], resume: bool) -> None:
        """Create the files, or read those of the run to resume.

        Raises:
            ValueError: The folder contains answers and `resume` is off, or settings differ.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / "config.json"
        if file.exists():
            advice = "Resume with the same settings, or give another --output"
            check_settings(self.folder, load_json(file), settings, advice)
        else:
            temporary = file.with_suffix(f".{os.getpid()}.tmp")  # parts write it at once
            temporary.write_text(json.dumps(settings, indent=2) + "\n")
            os.replace(temporary, file)
        files = (self.answers, self.errors, self.pending)
        if not resume and any(path.exists() for path in files):
            raise ValueError(
                f"{self.folder} already contains answers: use --resume to continue, "
                "or give another --output"
            )
        for path in files:
            path.touch()
        self.answered = sum(1 for _ in _complete_lines(self.answers))
        self.failed = {record["line"] for record in _read_records(self.errors)}
        self.waiting = {record["line"]: record for record in _read_records(self.pending)}

    def remaining(self, lines: Iterable[tuple[int, bytes]]) -> Iterator[tuple[int, bytes]]:
        """Yield the numbered lines whose outcome is not in the answers or errors file."""
        answered = self.answered
        for number, line in lines:
            if number in self.failed:
                continue
            if answered:
                answered -= 1
            else:
                yield number, line

    def add(self, records: Iterable[Record]) -> None:
        """Append the records of a batch to the pending file."""
        batch = {record["line"]: record for record in records}
        _append(self.pending, batch.values())
        self.waiting |= batch

    def commit(self, lines: Iterable[int]) -> None:
        """Move the records of a complete window to their files, in order."""
        records = [self.waiting[line] for line in lines]
        errors = [record for record in records if "error" in record]
        _append(self.errors, errors)  # first: see the class docstring
        _append(self.answers, (record["row"] for record in records if "error" not in record))
        self.pending.write_bytes(b"")
        self.answered += len(records) - len(errors)
        self.failed |= {record["line"] for record in errors}
        self.waiting = {}

    def finish(self) -> None:
        self.pending.unlink()


def output_files(folder: Path, name: str) -> list[Path]:
    """Return the "answers" or "errors" files of all parts in the folder, in order."""
    return sorted(folder.glob(f"{name}-?????-of-?????.jsonl")) or [folder / f"{name}.jsonl"]


def _append(file: Path, records: Iterable[object]) -> None:
    with file.open("ab") as out:
        out.writelines(map(_encode, records))


def _encode(record: object) -> bytes:
    return json.dumps(record, ensure_ascii=False).encode() + b"\n"


def _read_records(file: Path) -> Iterator[Record]:
    for number, line in enumerate(_complete_lines(file), 1):
        yield decode(line, Record, f"{file}: line {number}")


def _complete_lines(file: Path) -> Iterator[bytes]:
    """Yield the lines of `file`, and truncate it after the last complete one."""
    end = 0
    with file.open("r+b") as lines:
        for line in lines:
            if line.endswith(b"\n"):
                end += len(line)
                yield line
        lines.truncate(end)
