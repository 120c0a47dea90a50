"""The rows of a run: read, checked and counted before anything is written."""

from __future__ import annotations

import warnings
from functools import partial

import numpy as np

from paligemma_jax.data.rows import Example, RowSource, count_rows, example_at, read_examples
from paligemma_jax.processing.processor import Processor
from paligemma_jax.training.batches import encode_example
from paligemma_jax.training.box_sequences import BoxSequences
from paligemma_jax.training.config import FinetuneConfig


def read_rows(
    config: FinetuneConfig,
    processor: Processor,
    data: RowSource | None,
    validation: RowSource | None,
) -> tuple[RowSource, RowSource]:
    """Return the training rows and the validation rows, which may be empty."""
    check = partial(encode_example, processor=processor, length=config.length)
    sequences = BoxSequences.of(config)

    def check_sequence(example: Example) -> None:
        check(sequences(example, np.random.default_rng(0)))  # as long as any of them

    if data is None:
        data = read_examples(config.data, check_sequence)
    if validation is None:
        validation = read_examples(config.validation, check) if config.validation else []
    for name, rows in (("data", data), ("validation", validation)):
        count = count_rows(name, rows)
        if count and not any(example_at(rows, i).weight for i in range(count)):
            raise ValueError(f"{name} has no row with a weight above 0")
        _warn_of_empty_suffixes(name, rows)
    if not len(data):
        raise ValueError("data has no rows")
    if config.validate_every and not len(validation):
        raise ValueError(f"--validate-every {config.validate_every} requires --validation")
    return data, validation


def _warn_of_empty_suffixes(name: str, rows: RowSource) -> None:
    """Count the rows of a list whose suffix is empty. (Another source may open its images on every
    access.)"""
    if not isinstance(rows, list):
        return
    empty = sum(not example_at(rows, i).suffix for i in range(len(rows)))
    if empty:
        warnings.warn(
            f"{name}: the suffix is empty in {empty} of {len(rows)} rows, which train the model to "
            "answer with nothing",
            stacklevel=3,
        )
