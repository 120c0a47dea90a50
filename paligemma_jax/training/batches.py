"""."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import numpy as np

from paligemma_jax.data.rows import Example, error_prefix
from paligemma_jax.processing.image import pixel_values
from paligemma_jax.processing.processor import EncodedPrompt, Inputs, Processor, round_up


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    inputs: Inputs
    weights: Any  # float32 [B]; 0 for a row that only fills up
    features: Any = None  # of the image encoder [M, P, W]; then `inputs.images` is None. Both [B, n, ...] where all rows have n images


def encode_example(example: Example, processor: Processor, length: int | None) -> EncodedPrompt:
    """Its ids; ValueError if they are more than `length` or the context, or do not go with its images."""
    rows = processor.rows([list(example.images)], [example.prefix], [example.suffix])
    processor.pad(rows, "right", length)
    return rows[0]


def row_order(rows: int, seed: int, start: int, count: int) -> np.ndarray:
    """int64[count]: which rows come start-th and on, each epoch in another order: a function of its arguments alone, so a run resumes by counting."""
    epochs = range(start // rows, (start + count - 1) // rows + 1)
    return np.concatenate([_shuffled(rows, seed, epoch) for epoch in epochs])[start - epochs.start * rows :][:count]


@lru_cache(maxsize=2)
def _shuffled(rows: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(rows)


def make_batch(
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
        with error_prefix(f"row {example.line}"):
            rows.append(encode_example(example, processor, length))
            pictures += [] if features or n not in own else [pixel_values(rows[-1].images, processor.image_size)]
    images = [len(row.images) for row in rows]
    even = len(set(images)) == 1
    if len(set(np.reshape(images, (parts, -1)).sum(axis=1))) > 1:
        raise ValueError(f"rows {[e.line for e in examples]} have {images} images: --accumulate asks for as many in each of its {parts} parts")
    if len(own) < size and not even:
        raise ValueError(f"rows {[e.line for e in examples]} have {images} images: several processes ask for as many in every row of a batch")
    max_targets = max(len(row.prompt) + len(row.suffix) for row in rows)
    padded = processor.pad(rows, "right", length or min(round_up(max_targets), processor.context))
    weights = np.array([e.weight for e in examples] + [0.0] * (size - len(examples)), np.float32)
    seen = features([image for n in own for image in rows[n].images]) if features else np.concatenate(pictures)
    if even:
        mine = seen.reshape(len(own), -1, *seen.shape[1:])
        seen = mine if len(own) == size else np.zeros((size, *mine.shape[1:]), mine.dtype)
        seen[list(own)] = mine
    return Batch(Inputs(images=None if features else seen, **padded), weights, seen if features else None)


def prefetch(makers: Iterator[Any], depth: int = 4) -> Iterator[Any]:
    """The results of `makers` (functions without arguments) in order, made by threads while the last ones are in use."""
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(make) for _, make in zip(range(depth), makers)]
        while waiting:
            result = waiting.pop(0).result()
            if (make := next(makers, None)) is not None:
                waiting.append(pool.submit(make))
            yield result
