"""Examples to train on: rows of a JSONL file or of any random access source, checked.

A row is {"image": one path or several, "prefix": ..., "suffix": ..., "weight": optional}.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Protocol

import jax
from PIL import Image

from paligemma_jax.data.jsonl import parse_line, read_lines
from paligemma_jax.data.progress import progress_bar
from paligemma_jax.processing.image import ImageSource

MAX_ERRORS = 5  # errors of a file that are listed


class RowSource(Protocol):
    """Rows by index: a list, a data set, or a random access source of grain."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, object] | Example: ...


@dataclass(frozen=True)
class Example:
    images: tuple[ImageSource, ...]
    prefix: str
    suffix: str
    weight: float
    line: int  # line number in the file, or index in the source


def read_examples(
    file: str | Path, check: Callable[[Example], object] | None = None
) -> list[Example]:
    """Read all rows of a JSONL file and decode every image once, to report all errors at once.

    Args:
        file: Image paths are relative to it. Rows may have more fields.
        check: Raises a ValueError for an example that the model cannot process.

    Raises:
        ValueError: There is no such file, it has no rows, or rows cannot be used.
    """
    examples: list[Example] = []
    errors: dict[int, str] = {}
    for number, line in read_lines(file):
        try:
            examples.append(make_example(parse_line(line), number, Path(file).parent))
            if check:
                check(examples[-1])
        except ValueError as error:
            errors[number] = str(error)
    errors = _image_errors(examples) | errors
    if errors:
        messages = [f"line {number}: {errors[number]}" for number in sorted(errors)]
        listed = "; ".join(messages[:MAX_ERRORS])
        more = f"; and {len(messages) - MAX_ERRORS} more" if len(messages) > MAX_ERRORS else ""
        raise ValueError(f"{file}: {len(messages)} rows cannot be used: {listed}{more}")
    if not examples:
        raise ValueError(f"{file} has no rows")
    return examples


def make_example(
    row: object, line: int, folder: Path = Path(), requires_suffix: bool = True
) -> Example:
    """Check a row of any source.

    Args:
        row: A dict as above, or an `Example`, which is returned unchanged.
        line: The line or index of the row.
        folder: Directory that image paths are relative to.
        requires_suffix: Training needs a suffix; for inference it is dropped.

    Raises:
        ValueError: A field is missing or has the wrong type.
    """
    if isinstance(row, Example):
        return row
    texts = ("prefix", "suffix") if requires_suffix else ("prefix",)
    if not isinstance(row, dict):
        raise ValueError(f"not an object with image, {' and '.join(texts)}")
    for name in texts:
        if not isinstance(row.get(name), str):
            raise ValueError(f"{name} is {'not a string' if name in row else 'missing'}")
    image = row.get("image")
    images = image if isinstance(image, list | tuple) else [image]
    sources = [source for source in images if isinstance(source, ImageSource)]
    if not images or len(sources) < len(images):
        problem = "not a path or a list of paths" if "image" in row else "missing"
        raise ValueError(f"image is {problem}")
    weight = row.get("weight", 1.0)
    is_number = isinstance(weight, Real) and not isinstance(weight, bool)
    if not is_number or not 0 <= float(weight) < float("inf"):
        raise ValueError(f"weight must be a finite number of at least 0, got {weight!r}")
    sources = [folder / x if isinstance(x, str | Path) else x for x in sources]
    suffix = row["suffix"] if requires_suffix else ""
    return Example(tuple(sources), row["prefix"], suffix, float(weight), line)


def _image_errors(examples: list[Example]) -> dict[int, str]:
    """Return errors by line number. Each file is decoded once, in a pool of processes."""
    paths = list(dict.fromkeys(path for example in examples for path in example.images))
    paths = paths[jax.process_index() :: jax.process_count()]
    with ThreadPoolExecutor() as pool:
        decoded = pool.map(_image_error, paths)
        bar = progress_bar(decoded, "images", len(paths), unit="image", leave=False)
        errors = {path: error for path, error in zip(paths, bar, strict=True) if error}
    return {
        example.line: errors[path]
        for example in examples
        for path in example.images
        if path in errors
    }


def _image_error(path: ImageSource) -> str | None:
    try:
        with Image.open(path) as image:  # type: ignore[arg-type]
            image.draft("RGB", (1, 1))  # a JPEG at its coarsest scale: a third of the time
            image.load()
    except FileNotFoundError:
        return f"no such image: {path}"
    except Exception as error:  # Pillow's decoders raise many types of exceptions
        return f"{path} is not a readable image ({error})"
    return None


@contextmanager
def error_prefix(prefix: str) -> Iterator[None]:
    """Put `prefix` before the message of a ValueError raised inside."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{prefix}: {error}") from None


def count_rows(name: str, source: RowSource) -> int:
    """Return the number of rows.

    Raises:
        ValueError: `source` has no length, or repeats its rows without end.
    """
    try:
        count = len(source)
    except TypeError:
        raise ValueError(
            f"{name} must have a length, like a list, a data set or a grain MapDataset, "
            f"got {type(source).__name__}"
        ) from None
    if count >= 2**32:
        raise ValueError(
            f"{name} must have fewer than 2**32 rows, got {count}: do not repeat the data set; "
            "use --epochs or --steps"
        )
    return count


def example_at(source: RowSource, index: int) -> Example:
    """Return row `index` of a source, checked."""
    with error_prefix(f"row {index}"):
        return make_example(source[index], index)
