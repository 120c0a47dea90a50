"""Rows {"image": one or several, "prefix": ..., "suffix": ..., "weight": optional}, of JSONL or any source by number, -> batches.

A batch is a function of seed and step, whatever came before.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from numbers import Real
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from PIL import Image
from tqdm import tqdm

from paligemma_jax.processing.image import Source, pixels
from paligemma_jax.processing.processor import Inputs, Processor, Row, round_up


class Rows(Protocol):
    """What a JSONL file is read into, and what grain calls a random access source: dicts by number, the images as paths, PIL images or arrays."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any, /) -> Any: ...


@dataclass(frozen=True)
class Example:
    images: tuple[Source, ...]
    prefix: str
    suffix: str
    weight: float
    line: int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    inputs: Inputs
    weights: Any  # float32 [B]; 0 for a row that only fills up
    features: Any = None  # of the image encoder [M, P, W]; then `inputs.images` is None. Both [B, n, ...] where all rows have n images


def read(file: str | Path, fits: Callable[[Example], Any] | None = None) -> list[Example]:
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
    if not images or not all(isinstance(image, Source) for image in images):
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
def naming(what: str) -> Iterator[None]:
    """A ValueError inside says what it is about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None


def counted(name: str, source: Rows) -> int:
    """How many rows there are. ValueError if they have no number, or no end."""
    try:
        count = len(source)
    except TypeError:
        raise ValueError(f"{name} has no length: give what has rows by number, as a list, a data set, or a MapDataset of grain") from None
    if count >= 2**32:
        raise ValueError(f"{name} has {count} rows: leave out what repeats them, --epochs and --steps do")
    return count


def example_at(source: Rows, index: int) -> Example:
    with naming(f"row {index}"):
        return make_example(source[index], index)


def tokenized(example: Example, processor: Processor, length: int | None) -> Row:
    """Its ids; ValueError if they are more than `length` or the context, or do not go with its images."""
    rows = processor.rows([list(example.images)], [example.prefix], [example.suffix])
    processor.pad(rows, "right", length)
    return rows[0]


def order(rows: int, seed: int, start: int, count: int) -> np.ndarray:
    """int64[count]: which rows come start-th and on, each epoch in another order: a function of its arguments alone, so a run resumes by counting."""
    epochs = range(start // rows, (start + count - 1) // rows + 1)
    return np.concatenate([_shuffled(rows, seed, epoch) for epoch in epochs])[start - epochs.start * rows :][:count]


@lru_cache(maxsize=2)
def _shuffled(rows: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(rows)


def batch(
    examples: Sequence[Example],
    processor: Processor,
    size: int,
    length: int | None,
    parts: int = 1,
    features: Callable[[list], Any] | None = None,
    own: Sequence[int] | None = None,
) -> Batch:
    """These examples as one batch of `size` rows, padded on the right to `length` tokens or the next bucket; missing rows weigh 0.

    parts: so many will be computed one after the other: ValueError if they have not as many images each.
    features: of image files, in the place of their pixels.
    own: the rows whose images are opened here, all by default; the others are for other processes, and zeros of which no memory is touched.
    """
    filled = [*examples, *[examples[0]] * (size - len(examples))]
    rows, pictures, own = [], [], range(size) if own is None else own
    for n, example in enumerate(filled):
        with naming(f"row {example.line}"):
            rows.append(tokenized(example, processor, length))
            pictures += [] if features or n not in own else [pixels(rows[-1].images, processor.image_size)]
    images = [len(row.images) for row in rows]
    even = len(set(images)) == 1
    if len(set(np.reshape(images, (parts, -1)).sum(axis=1))) > 1:
        raise ValueError(f"rows {[e.line for e in examples]} have {images} images: --accumulate asks for as many in each of its {parts} parts")
    if len(own) < size and not even:
        raise ValueError(f"rows {[e.line for e in examples]} have {images} images: several processes ask for as many in every row of a batch")
    longest = max(len(row.prompt) + len(row.suffix) for row in rows)
    padded = processor.pad(rows, "right", length or min(round_up(longest), processor.context))
    weights = np.array([e.weight for e in examples] + [0.0] * (size - len(examples)), np.float32)
    seen = features([image for n in own for image in rows[n].images]) if features else np.concatenate(pictures)
    if even:
        mine = seen.reshape(len(own), -1, *seen.shape[1:])
        seen = mine if len(own) == size else np.zeros((size, *mine.shape[1:]), mine.dtype)
        seen[list(own)] = mine
    return Batch(Inputs(images=None if features else seen, **padded), weights, seen if features else None)


def ahead(makers: Iterator[Any], depth: int = 4) -> Iterator[Any]:
    """The results of `makers` (functions without arguments) in order, made by threads while the last ones are in use."""
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(make) for _, make in zip(range(depth), makers)]
        while waiting:
            result = waiting.pop(0).result()
            if (make := next(makers, None)) is not None:
                waiting.append(pool.submit(make))
            yield result
