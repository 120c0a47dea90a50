"""Directories and files: outputs that appear only when complete, JSON, and the files that come along with the weights."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

JSON_LIMIT = 2**24  # bytes; the header and index of a 28b model have 0.2 MB
COMPANIONS = (".json", ".jsonl", ".model", ".txt", ".jinja", ".md")  # never .py: no code comes along


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; ValueError in one line if there is none."""
    try:
        if file.stat().st_size > JSON_LIMIT:
            raise ValueError(f"it has more than {JSON_LIMIT} bytes")
        value = json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{file.parent} has no {file.name}: it is not a Hugging Face checkpoint directory") from None
    except (OSError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON, a number of 5,000 digits
        raise ValueError(f"{file} is not readable JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file} holds no JSON object")
    return value


def json_bytes(value: Any, **how: Any) -> bytes:
    return (json.dumps(value, indent=2, **how) + "\n").encode()


def write_json(file: Path, value: Any, **how: Any) -> None:
    file.write_bytes(json_bytes(value, **how))


def companions(directory: Path) -> dict[str, Path | bytes]:
    """The files of a checkpoint directory beside its weights: config.json, tokenizer, processor, generation, licence, mask codec."""
    found = {file.name: file for file in sorted(directory.iterdir()) if file.is_file() and not file.name.startswith(".")}
    return {name: file for name, file in found.items() if file.suffix in COMPANIONS or name.startswith(("LICENSE", "NOTICE", "vae-"))}


def write_files(directory: Path, files: dict[str, Path | bytes]) -> None:
    for name, content in files.items():
        if isinstance(content, bytes):
            (directory / name).write_bytes(content)
        else:
            shutil.copyfile(content, directory / name)


@contextmanager
def output(destination: Path, force: bool, nbytes: int = 0) -> Iterator[Path]:
    """A path to write a file or a directory to, which becomes `destination` when all went well; until then there is none.

    What is unfinished lies in `.NAME.unfinished` beside it; an interrupted run may leave that behind, the next one clears it away.
    ValueError if `destination` exists (with `force` it is replaced once the new one is complete), if another run is writing it, or
    if the disk has less than `nbytes` free.
    """
    import fcntl  # a POSIX system is needed to write, not to load

    if destination.exists() and not force:
        raise ValueError(f"{destination} exists; give another name, or --force to replace it")
    if not destination.parent.is_dir():
        raise ValueError(f"{destination.parent} is not a directory")
    if nbytes > (free := shutil.disk_usage(destination.parent).free):
        raise ValueError(f"{destination} needs {nbytes / 1e9:.1f} GB; {free / 1e9:.1f} GB are free on that disk")
    work = destination.with_name(f".{destination.name}.unfinished")
    new, replaced = work / destination.name, work / ".replaced"
    work.mkdir(exist_ok=True)
    lock = os.open(work, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise ValueError(f"another conversion is writing {destination}") from None
    try:
        _recover(destination, replaced)
        _clear(work)
        yield new
        _sync([new, *new.rglob("*")])
        if destination.exists():
            os.rename(destination, replaced)
        os.rename(new, destination)
        _sync([destination.parent])
    finally:
        _recover(destination, replaced)
        shutil.rmtree(work, ignore_errors=True)
        os.close(lock)


def _recover(destination: Path, replaced: Path) -> None:
    """Undoes a replacement that was interrupted between its two renames."""
    if replaced.exists() and not destination.exists():
        os.rename(replaced, destination)


def _clear(work: Path) -> None:
    for item in work.iterdir():
        shutil.rmtree(item) if item.is_dir() else item.unlink()


def _sync(paths: Iterable[Path]) -> None:
    """To the disk, so that not even a power cut leaves a final name on half a checkpoint. Many at once, which the file system joins."""

    def one(path: Path) -> None:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(one, paths))
