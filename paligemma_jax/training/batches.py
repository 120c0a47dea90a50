"""Batches: which examples a step trains on, and their arrays."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import islice
from typing import TypeVar

import jax
import numpy as np

from paligemma_jax.data.rows import Example, RowSource, error_prefix, example_at
from paligemma_jax.processing.image import ImageSource
from paligemma_jax.processing.processor import AnyArray, EncodedPrompt, Inputs, Processor, round_up
from paligemma_jax.training.augment import Augment
from paligemma_jax.training.box_sequences import BoxSequences, without_noise_locations
from paligemma_jax.training.config import FinetuneConfig

T = TypeVar("T")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """The arrays of B examples; a pytree.

    `inputs.images` and `features` have a leading axis [B, n] if all examples have n images, else
    [M] for all images of the batch.
    """

    inputs: Inputs
    weights: AnyArray  # float32[B]; 0 for rows that only fill the batch
    features: AnyArray | None = None  # [..., P, W] of the encoder, instead of images


def max_targets(batch: Batch) -> int:
    """The largest number of targets in a row, rounded up so that few programs are compiled."""
    return round_up(int(batch.inputs.targets.sum(axis=1).max()))


def encode_example(example: Example, processor: Processor, length: int | None) -> EncodedPrompt:
    """Tokenize an example.

    Raises:
        ValueError: It has more tokens than `length` or the context, or its number of images does
            not match the prompt.
    """
    rows = processor.encode([list(example.images)], [example.prefix], [example.suffix])
    processor.padded_length(rows, length)
    if example.trained_boxes is None:
        return rows[0]
    return without_noise_locations(rows[0], example.trained_boxes, processor.tokenizer)


@dataclass(frozen=True)
class Batcher:
    """Turns examples into batches of one size.

    In a multi-process run, each process opens the images of its own rows only. The other rows of
    its batch are zeros, whose memory is never touched.
    """

    processor: Processor
    size: int
    length: int | None  # tokens per row; by default the longest row's, rounded up
    local_rows: Sequence[int]  # rows whose images this process opens
    features: Callable[[list[ImageSource]], np.ndarray] | None = None  # replaces opening images

    def __call__(self, examples: Sequence[Example], parts: int = 1) -> Batch:
        """Make one batch. Missing rows are copies of the first, with weight 0.

        Args:
            examples: At most `size` of them.
            parts: Number of parts that the batch will be split into.

        Raises:
            ValueError: An example cannot be encoded, or the numbers of images do not allow the
                split into parts or processes.
        """
        fill = self.size - len(examples)
        rows, pixels = [], []
        for i, example in enumerate([*examples, *[examples[0]] * fill]):
            with error_prefix(f"row {example.line}"):
                row = encode_example(example, self.processor, self.length)
                if i in self.local_rows and not self.features:
                    pixels.append(self.processor.pixel_values(row.images))
            rows.append(row)
        self._check_image_counts(examples, rows, parts)
        length = self.length or min(round_up(max(map(len, rows))), self.processor.context)
        tokens = self.processor.pad(rows, "right", length)
        weights = np.array([example.weight for example in examples] + [0.0] * fill, np.float32)
        if self.features:
            images = [image for i in self.local_rows for image in rows[i].images]
            features = self._all_rows(rows, self.features(images))
            return Batch(Inputs(images=None, **tokens), weights, features)
        return Batch(Inputs(images=self._all_rows(rows, np.concatenate(pixels)), **tokens), weights)

    def in_order(self, source: RowSource) -> Iterator[Batch]:
        """All rows of a source, unchanged."""

        def make(start: int) -> Batch:
            stop = min(start + self.size, len(source))
            return self([example_at(source, i) for i in range(start, stop)])

        return prefetch(partial(make, start) for start in range(0, len(source), self.size))

    def _check_image_counts(
        self, examples: Sequence[Example], rows: list[EncodedPrompt], parts: int
    ) -> None:
        counts = [len(row.images) for row in rows]
        if len(set(np.reshape(counts, (parts, -1)).sum(axis=1))) > 1:
            reason = f"--accumulate requires the same number in each of its {parts} parts"
        elif len(self.local_rows) < self.size and len(set(counts)) > 1:
            reason = "several processes require the same number in every row of a batch"
        else:
            return
        lines = [example.line for example in examples]
        raise ValueError(f"rows {lines} have {counts} images: {reason}")

    def _all_rows(self, rows: list[EncodedPrompt], images: np.ndarray) -> np.ndarray:
        """[M, ...] of the local rows -> [B, n, ...] of all rows, if each has n images."""
        if len({len(row.images) for row in rows}) > 1:
            return images
        images = images.reshape(len(self.local_rows), -1, *images.shape[1:])
        if len(self.local_rows) == self.size:
            return images
        batch = np.zeros((self.size, *images.shape[1:]), images.dtype)
        batch[list(self.local_rows)] = images
        return batch


def training_batch(config: FinetuneConfig, batcher: Batcher, source: RowSource, step: int) -> Batch:
    """The batch of a step, counted from 0."""
    examples = training_examples(config, batcher.processor, source, step)
    sequences, first = BoxSequences.of(config), step * config.batch_size
    examples = [
        sequences(example, np.random.default_rng((config.seed, i, 1)))
        for i, example in enumerate(examples, first)
    ]
    return batcher(examples, config.accumulate)


def training_examples(
    config: FinetuneConfig, processor: Processor, source: RowSource, step: int
) -> list[Example]:
    """The examples of a step, augmented. They depend on the seed and `step` only, so that a resumed
    run continues with the same rows and augmentations."""
    start = step * config.batch_size
    order = row_order(len(source), config.seed, start, config.batch_size)
    examples = [example_at(source, int(i)) for i in order]
    if not config.augments:
        return examples
    augment = Augment(config.flip, config.crop, config.color, processor.image_settings.on_white)
    return [
        augment(example, np.random.default_rng((config.seed, i)))
        for i, example in enumerate(examples, start)
    ]


def row_order(rows: int, seed: int, start: int, count: int) -> np.ndarray:
    """int64[count]: which rows are visited at positions start, start + 1, ... of a run, which
    shuffles its `rows` rows anew each epoch."""
    epochs = range(start // rows, (start + count - 1) // rows + 1)
    order = np.concatenate([_shuffled(rows, seed, epoch) for epoch in epochs])
    return order[start - epochs.start * rows :][:count]


@lru_cache(maxsize=2)
def _shuffled(rows: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(rows)


def prefetch(makers: Iterator[Callable[[], T]], depth: int = 4) -> Iterator[T]:
    """Call `makers` in threads, up to `depth` ahead of the consumer; yield the results in order."""
    with ThreadPoolExecutor(2) as pool:
        waiting = deque(pool.submit(make) for make in islice(makers, depth))
        while waiting:
            result = waiting.popleft().result()
            waiting.extend(pool.submit(make) for make in islice(makers, 1))
            yield result
