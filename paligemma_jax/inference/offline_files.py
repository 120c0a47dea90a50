"""The files of one part of an offline run: what was answered, in order, and what a killed run leaves to go on from."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


class OutputFiles:
    """answers.jsonl, errors.jsonl and pending.jsonl in `folder`, or with -000n-of-000m in their names where there are several parts.

    pending holds {"line", "row"} or {"line", "error", "row"} of each finished batch until its window is whole; then the errors, in the form that
    they have there, and after them the answered rows alone are added to the other two. So after a kill at any moment the rows to come are those
    behind as many rows without error as there are answers.
    """

    def __init__(self, folder: Path, number: int, of: int):
        if not 0 <= number < of:
            raise ValueError(f"there is no part {number} of {of}: parts count from 0")
        suffix = f"-{number:05}-of-{of:05}" if of > 1 else ""
        self.folder = folder
        self.answers, self.errors, self.pending = (folder / f"{name}{suffix}.jsonl" for name in ("answers", "errors", "pending"))
        self.answered, self.failed, self.waits = 0, set[int](), dict[int, dict[str, Any]]()

    def begin(self, settings: dict[str, Any], resume: bool) -> None:
        """Takes up what is there. ValueError if that was begun with other settings, or is there without `resume`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / "config.json"
        if file.exists():
            before = json.loads(file.read_text())
            if other := [name for name, value in settings.items() if before.get(name) != value]:
                told = ", ".join(f"{name} {before.get(name)!r}, now {settings[name]!r}" for name in other)
                raise ValueError(f"{self.folder} was begun with other settings: {told}; resume with the same, or give another --output")
        else:
            beside = file.with_suffix(f".{os.getpid()}.tmp")  # of several parts that begin at the same time, all write the same
            beside.write_text(json.dumps(settings, indent=2) + "\n")
            os.replace(beside, file)
        files = (self.answers, self.errors, self.pending)
        if not resume and any(path.exists() for path in files):
            raise ValueError(f"{self.folder} holds answers already: --resume to go on with them, or give another --output")
        for path in files:
            path.touch()
        self.answered = sum(1 for _ in _whole(self.answers))
        self.failed = {json.loads(line)["line"] for line in _whole(self.errors)}
        self.waits = {record["line"]: record for record in map(json.loads, _whole(self.pending))}

    def to_come(self, rows: Iterable[tuple[int, bytes]]) -> Iterator[tuple[int, bytes]]:
        """Those of `rows` (line, text) that are in no file but perhaps pending."""
        settled = self.answered
        for line, text in rows:
            if line in self.failed:
                continue
            if settled:
                settled -= 1
            else:
                yield line, text

    def note(self, records: Iterable[dict[str, Any]]) -> None:
        """Writes the records of a batch, so that it is not lost."""
        found = {record["line"]: record for record in records}
        _append(self.pending, found.values())
        self.waits |= found

    def settle(self, lines: Iterable[int]) -> None:
        """A window is whole: its records, all of them pending, go where they belong, in order."""
        records = [self.waits[line] for line in lines]
        wrong = [record for record in records if "error" in record]
        _append(self.errors, wrong)  # first: see above
        _append(self.answers, (record["row"] for record in records if "error" not in record))
        self.pending.write_bytes(b"")
        self.answered, self.failed, self.waits = self.answered + len(records) - len(wrong), self.failed | {record["line"] for record in wrong}, {}

    def finish(self) -> None:
        self.pending.unlink()


def output_files(folder: Path, name: str) -> list[Path]:
    """The files of "answers" or "errors" in the folder, of all parts, in order."""
    return sorted(folder.glob(f"{name}-?????-of-?????.jsonl")) or [folder / f"{name}.jsonl"]


def _append(file: Path, records: Iterable[Any]) -> None:
    with file.open("ab") as out:
        out.writelines(map(_line, records))


def _line(record: Any) -> bytes:
    try:
        return json.dumps(record, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can escape and UTF-8 cannot say
        return json.dumps(record).encode() + b"\n"


def _whole(file: Path) -> Iterator[bytes]:
    """The lines of `file`, which is cut off after the last whole one."""
    end = 0
    with file.open("r+b") as lines:
        for line in lines:
            if line.endswith(b"\n"):
                end += len(line)
                yield line
        lines.truncate(end)
