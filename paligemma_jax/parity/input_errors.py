"""The errors of the inputs made here against those of transformers' own processor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from paligemma_jax.parity.case import Examples, ParityCase
from paligemma_jax.parity.compare import StageError, describe_shapes, measure_error
from paligemma_jax.processing.processor import Inputs

LIMITS = (0.0, 0.0)  # inputs must be equal bit by bit


def input_errors(case: ParityCase) -> Iterator[StageError]:
    """Yield the errors of the pixels, the ids, valid (the attention mask) and targets (the token
    types). Random inputs have none: both sides share them."""
    if case.examples is None:
        return
    ours, theirs, examples = case.own_inputs, case.inputs, case.examples

    def row(name: str, here: np.ndarray, there: np.ndarray, details: Iterator[str]) -> StageError:
        error = measure_error(here, there)
        return StageError(name, error, error, LIMITS, details=tuple(details))

    assert ours.images is not None and theirs.images is not None
    images = _image_details(ours.images, theirs.images, examples.images)
    yield row("pixels", ours.images, theirs.images, images)

    def piece(token: int) -> str:
        return f"{token} {examples.theirs.piece(token)!r}"

    def kind(target: int) -> str:
        return "a target" if target else "no target"

    details = {
        "ids": _token_details("tokens", ours, theirs, examples, piece),
        "valid": iter(()),  # tells the lengths, as the ids do
        "targets": _token_details("targets", ours, theirs, examples, kind),
    }
    for name, lines in details.items():
        field = "tokens" if name == "ids" else name
        yield row(name, *_same_width(getattr(ours, field), getattr(theirs, field)), lines)


def _image_details(ours: np.ndarray, theirs: np.ndarray, files: list[str]) -> Iterator[str]:
    """Yield the largest difference of each image that differs."""
    if ours.shape != theirs.shape:
        yield describe_shapes(ours, theirs)
        return
    for i, file in enumerate(files):
        difference = np.abs(ours[i] - theirs[i]).max()
        if difference:
            yield f"image {i} ({Path(file).name}) differs by up to {difference:.2g}"


def _token_details(
    field: str, ours: Inputs, theirs: Inputs, examples: Examples, describe: Callable[[int], str]
) -> Iterator[str]:
    """Yield the first difference of each example that differs, counted without pads."""
    for i, prompt in enumerate(examples.prompts):
        rows = [getattr(inputs, field)[i][inputs.valid[i]].tolist() for inputs in (ours, theirs)]
        if rows[0] == rows[1]:
            continue
        at = next((n for n, (a, b) in enumerate(zip(*rows, strict=False)) if a != b), None)
        at = min(map(len, rows)) if at is None else at
        here, there = (describe(row[at]) if at < len(row) else "missing" for row in rows)
        counts = f"{len(rows[0])} and {len(rows[1])} tokens"
        yield f"{prompt!r}: token {at} is {here} here and {there} in transformers ({counts})"


def _same_width(ours: np.ndarray, theirs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both as integers, padded on the left to the longer of the two."""
    width = max(ours.shape[1], theirs.shape[1])
    here, there = (
        np.pad(array.astype(np.int32), [(0, 0), (width - array.shape[1], 0)])
        for array in (ours, theirs)
    )
    return here, there
