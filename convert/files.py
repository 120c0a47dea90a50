"""Files: outputs that appear only when complete, JSON, and the files beside the weights."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from convert.typed_json import JsonObject, decode, load_json

FileContent = Path | bytes  # a file to copy, or its new content

COMPANIONS = (".json", ".jsonl", ".model", ".txt", ".jinja", ".md")  # never code


def user_path(path: str | Path) -> Path:
    """The path with `~` and `~user` expanded. Raises ValueError if there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ValueError(f"{path}: no such user: {Path(path).parts[0][1:]}") from None


def parse_json(content: FileContent) -> JsonObject:
    """Parse a JSON object to edit it. ValueError if it is none."""
    return decode(content) if isinstance(content, bytes) else load_json(content)


def json_bytes(value: JsonObject, sort_keys: bool = False) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=sort_keys) + "\n").encode()


def companion_files(directory: Path) -> dict[str, FileContent]:
    """The files beside the weights of a checkpoint: config.json, tokenizer, processor, generation
    config, license, mask codec."""
    return {
        file.name: file
        for file in sorted(directory.iterdir())
        if file.is_file()
        and not file.name.startswith(".")
        and (file.suffix in COMPANIONS or file.name.startswith(("LICENSE", "NOTICE", "vae-")))
    }


def copy_files(directory: Path, files: Mapping[str, FileContent]) -> None:
    for name, content in files.items():
        if isinstance(content, bytes):
            (directory / name).write_bytes(content)
        else:
            shutil.copyfile(content, directory / name)


@contextmanager
def atomic_output(destination: Path, force: bool, nbytes: int = 0) -> Iterator[Path]:
    """Yield a path for a new file or directory, and move it to `destination` on success.

    Unfinished output is in `.NAME.unfinished` beside the destination. An interrupted run may leave
    it behind; the next run removes it.

    Args:
        destination: The final path.
        force: Replace what is there, once the new output is complete.
        nbytes: Required free disk space.

    Raises:
        ValueError: If `destination` exists, if another process is writing it, or if the disk is too
            full.
    """
    import fcntl  # POSIX only, and needed only to write

    if destination.exists() and not force:
        raise ValueError(f"{destination} exists; choose another name, or replace it with --force")
    if not destination.parent.is_dir():
        raise ValueError(f"{destination.parent} is not a directory")
    free = shutil.disk_usage(destination.parent).free
    if nbytes > free:
        needed = f"{destination} needs {nbytes / 1e9:.1f} GB"
        raise ValueError(f"{needed}, but only {free / 1e9:.1f} GB are free on that disk")
    work = destination.with_name(f".{destination.name}.unfinished")
    new, replaced = work / destination.name, work / ".replaced"
    work.mkdir(exist_ok=True)
    lock = os.open(work, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise ValueError(f"another process is writing {destination}") from None
    try:
        _recover(destination, replaced)
        for leftover in work.iterdir():
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
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
    """Undo a replacement that was interrupted between its two renames."""
    if replaced.exists() and not destination.exists():
        os.rename(replaced, destination)


def _sync(paths: Iterable[Path]) -> None:
    """Flush files to the disk, so that not even a power failure leaves a partial checkpoint under
    its final name. In parallel, which the file system combines."""

    def sync(path: Path) -> None:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(sync, paths))
