"""Annotated images, as the readers of annotation formats yield them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from paligemma_jax.data.shapes import Shape
from paligemma_jax.processing.locations import Box, Size

DATA_LIMIT = 2**32  # bytes of a JSON file; COCO's instances_train2017.json has 449 MB


@dataclass(frozen=True)
class AnnotatedObject:
    label: str
    box: Box | None = None  # left, top, right, bottom in pixels, not clipped
    shape: Shape | None = None
    problem: str = ""  # why it is dropped


@dataclass(frozen=True)
class AnnotatedImage:
    file: Path
    size: Size | None  # as annotated
    objects: list[AnnotatedObject] = field(default_factory=list)
    id: int | str | None = None
    source: str = ""  # the file of the annotations, for errors


def annotation_files(paths: Sequence[Path], suffix: str) -> Iterable[Path]:
    """The files themselves, and those with the suffix in directories and below, sorted.

    Raises:
        ValueError: There are none.
    """
    files = list(_expand(paths, suffix))
    if not files:
        raise ValueError(f"no {suffix} files in {', '.join(map(str, paths)) or 'no --files'}")
    return files


def _expand(paths: Sequence[Path], suffix: str) -> Iterator[Path]:
    for path in paths:
        if path.is_dir():
            yield from sorted(path.rglob(f"*{suffix}"))
        elif path.is_file():
            yield path
        else:
            raise ValueError(f"{path}: no such file or directory of annotations")


def read_text(file: Path, limit: int = 2**24) -> str:
    """Read a text file of at most `limit` bytes.

    Raises:
        ValueError: It is larger, or not UTF-8.
    """
    if file.stat().st_size > limit:
        raise ValueError(f"{file} must have at most {limit} bytes, got {file.stat().st_size}")
    try:
        return file.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} must be UTF-8, got byte {error.start} that is not") from None
