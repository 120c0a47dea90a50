"""Examples to train on: rows of a JSONL file or of any random access source, checked.

A row is {"image": one path or several, "prefix": ..., "suffix": ..., "weight": optional}.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import jax

from convert.typed_json import decode, describe
from paligemma_jax.data.images import image_error
from paligemma_jax.data.jsonl import read_lines
from paligemma_jax.data.progress import progress_bar
from paligemma_jax.processing.image import ImageSource
from paligemma_jax.processing.image_array import is_channels_first

MAX_ERRORS = 5  # errors of a file that are listed
MAX_WEIGHT = 3.4e38  # of float32, in which losses are weighted


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
    trained_boxes: int | None = None  # boxes whose locations count in the loss; by default all
    row: Mapping[str, object] = field(default_factory=dict, compare=False, repr=False)  # all fields


def read_examples(
    file: str | Path, check: Callable[[Example], object] | None = None, limit: int | None = None
) -> list[Example]:
    """Read the rows of a JSONL file and decode every image once, to report all errors at once.

    Args:
        file: Image paths are relative to it. Rows may have more fields.
        check: Raises a ValueError for an example that the model cannot process.
        limit: Read only this many rows.

    Raises:
        ValueError: There is no such file, it has no rows, or rows cannot be used.
    """
    examples: list[Example] = []
    errors: dict[int, str] = {}
    for number, line in islice(read_lines(file), limit):
        try:
            examples.append(make_example(decode(line), number, Path(file).parent))
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
    if not isinstance(row, Mapping):
        fields = f"image, {' and '.join(texts)}"
        raise ValueError(f"a row must be an object with {fields}, got {describe(row)}")
    for name in texts:
        _require(isinstance(row.get(name), str), row, name, "a string")
    image: Any = row.get("image")
    stacked = getattr(image, "ndim", 0) == 4  # as data sets format a list of equal sizes
    images = list(image) if isinstance(image, list | tuple) or stacked else [image]
    sources = [_image_source(x, folder) for x in images]
    sources = [source for source in sources if source is not None]
    valid = 0 < len(images) == len(sources)
    _require(valid, row, "image", "a path, an image, or a list of them")
    suffix = row["suffix"] if requires_suffix else ""
    return Example(tuple(sources), row["prefix"], suffix, _weight(row), line, row=row)


def _image_source(image: Any, folder: Path) -> ImageSource | None:
    """Return an image of a row, a path relative to `folder`; None if it is not an image."""
    if isinstance(image, dict):  # {"bytes", "path"}: an image column that is not decoded
        content = image.get("bytes")
        if content is not None:
            return content if isinstance(content, bytes) else None
        image = image.get("path")
    if isinstance(image, str | Path):
        return folder / image
    # Hugging Face data sets in torch format have the channels first, those in other formats last.
    if hasattr(image, "permute") and is_channels_first(image.shape):
        return image.permute(1, 2, 0)
    return image if isinstance(image, ImageSource) else None


def _weight(row: Mapping[str, Any]) -> float:
    """The weight of a row, which may be an array without axes; null counts as absent."""
    weight = row.get("weight")
    if weight is None:
        return 1.0
    number = weight.item() if getattr(weight, "shape", None) == () else weight
    is_number = isinstance(number, int | float) and not isinstance(number, bool)
    valid = is_number and 0 <= number <= MAX_WEIGHT
    _require(valid, row, "weight", "a finite number of at least 0 in float32")
    return float(number)


def _require(valid: bool, row: Mapping[str, object], name: str, expected: str) -> None:
    """Raise a ValueError unless the field of a row is valid."""
    if row.get(name) is None:
        raise ValueError(f"{name} is missing")
    if not valid:
        raise ValueError(f"{name} must be {expected}, got {describe(row[name])}")


def _image_errors(examples: list[Example]) -> dict[int, str]:
    """Return errors by line number. Each file is decoded once, in a pool of processes."""
    paths = list(dict.fromkeys(path for example in examples for path in example.images))
    paths = paths[jax.process_index() :: jax.process_count()]
    with ThreadPoolExecutor() as pool:
        decoded = pool.map(image_error, paths)
        bar = progress_bar(decoded, "images", len(paths), unit="image", leave=False)
        errors = {path: error for path, error in zip(paths, bar, strict=True) if error}
    return {
        example.line: errors[path]
        for example in examples
        for path in example.images
        if path in errors
    }


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
        ValueError: `source` has no length, repeats its rows without end, or is a dict of splits.
    """
    if isinstance(source, Mapping):
        splits = ", ".join(map(str, source))
        raise ValueError(
            f"{name} must be the rows of one split, got a {type(source).__name__} of {splits}: "
            f"pass {name}[{next(iter(source), 'train')!r}]"
        )
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
