"""Rows {"image": one or several, "prefix": ..., "suffix": ..., "weight": optional}, of JSONL or any source by number, -> batches.

A batch is a function of seed and step, whatever came before.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any, Protocol

import jax
from PIL import Image
from tqdm import tqdm

from paligemma_jax.processing.image import ImageSource


class RowSource(Protocol):
    """What a JSONL file is read into, and what grain calls a random access source: dicts by number, the images as paths, PIL images or arrays."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any, /) -> Any: ...


@dataclass(frozen=True)
class Example:
    images: tuple[ImageSource, ...]
    prefix: str
    suffix: str
    weight: float
    line: int




def read_examples(file: str | Path, fits: Callable[[Example], Any] | None = None) -> list[Example]:
    """All rows of a JSONL file, image paths relative to it, every image decoded once; other fields are allowed. ValueError tells all that is wrong.

    fits: raises a ValueError for a row that the model cannot take.
    """
    path, examples, wrong = Path(file), [], {}
    if not path.is_file():
        raise ValueError(f"{file}: no such file; give JSONL with image, prefix and suffix on each line")
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                if line.strip():
                    examples.append(make_example(json.loads(line), number, path.parent))
                    if fits:
                        fits(examples[-1])
            except (ValueError, RecursionError) as error:
                wrong[number] = f"not JSON ({error})" if isinstance(error, json.JSONDecodeError | UnicodeDecodeError | RecursionError) else str(error)
    wrong = _unreadable(examples) | wrong
    if wrong:
        told = [f"line {number}: {wrong[number]}" for number in sorted(wrong)]
        more = f"; and {len(told) - 5} more" if len(told) > 5 else ""
        raise ValueError(f"{file}: {len(told)} rows cannot be used: {'; '.join(told[:5])}{more}")
    if not examples:
        raise ValueError(f"{file} has no rows")
    return examples


def make_example(row: Any, line: int, folder: Path = Path(), learns: bool = True) -> Example:
    """A row of any source, checked; paths relative to `folder`. ValueError for what it lacks. Only to learn from, it needs a suffix."""
    if isinstance(row, Example):
        return row
    if not isinstance(row, dict):
        raise ValueError(f"not an object with image{', prefix and suffix' if learns else ' and prefix'}")
    for name in ("prefix", "suffix") if learns else ("prefix",):
        if not isinstance(row.get(name), str):
            raise ValueError(f"{name} is {'missing' if name not in row else 'not a text'}")
    if learns and not row["suffix"]:
        raise ValueError("suffix is empty: there is nothing to learn")
    images: Any = [row.get("image")] if not isinstance(row.get("image"), list | tuple) else row["image"]
    if not images or not all(isinstance(image, ImageSource) for image in images):
        raise ValueError(f"image is {'missing' if 'image' not in row else 'not a path or a list of paths'}")
    weight = row.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, Real) or not 0 <= float(weight) < float("inf"):
        raise ValueError(f"weight is {weight!r}, not a number from 0 on")
    images = tuple(folder / image if isinstance(image, str | Path) else image for image in images)
    return Example(images, row["prefix"], row["suffix"] if learns else "", float(weight), line)


def _unreadable(examples: list[Example]) -> dict[int, str]:
    """What is wrong with an image, by the line of each row that has it; each file is decoded once, in one of several processes."""
    paths = list(dict.fromkeys(path for example in examples for path in example.images))[jax.process_index() :: jax.process_count()]
    with ThreadPoolExecutor() as pool:
        found = dict(zip(paths, tqdm(pool.map(_problem, paths), "images", len(paths), unit="image", disable=None, leave=False)))
    return {example.line: told for example in examples for path in example.images if (told := found.get(path))}


def _problem(path: Any) -> str | None:
    try:
        with Image.open(path) as image:
            image.draft("RGB", (1, 1))  # of a JPEG the coarsest scale: to its end, in a third of the time
            image.load()
    except FileNotFoundError:
        return f"no such image: {path}"
    except Exception as error:  # Pillow's decoders raise of every kind
        return f"{path} is not a readable image ({error})"
    return None


@contextmanager
def error_prefix(what: str) -> Iterator[None]:
    """A ValueError inside says what it is about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None


def count_rows(name: str, source: RowSource) -> int:
    """How many rows there are. ValueError if they have no number, or no end."""
    try:
        count = len(source)
    except TypeError:
        raise ValueError(f"{name} has no length: give what has rows by number, as a list, a data set, or a MapDataset of grain") from None
    if count >= 2**32:
        raise ValueError(f"{name} has {count} rows: leave out what repeats them, --epochs and --steps do")
    return count


def example_at(source: RowSource, index: int) -> Example:
    with error_prefix(f"row {index}"):
        return make_example(source[index], index)










