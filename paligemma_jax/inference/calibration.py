"""Quantize an open checkpoint with GPTQ, calibrated on rows of a JSONL file."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax

from convert.checkpoint import Checkpoint
from convert.quantized import quantize_checkpoint
from convert.tensor import from_array
from paligemma_jax.checkpoints.load import read_model
from paligemma_jax.checkpoints.source import CheckpointSource
from paligemma_jax.data.progress import progress_bar
from paligemma_jax.data.rows import Example, read_examples
from paligemma_jax.inference.loading import make_processor
from paligemma_jax.model.precision import Quantization
from paligemma_jax.model.tree import parameters
from paligemma_jax.processing.processor import Inputs, Processor
from paligemma_jax.quantization.quantize import quantize_model, weight_formats

BATCH = 8  # rows that are encoded together


def calibrate_checkpoint(
    checkpoint: Checkpoint,
    source: CheckpointSource,
    quantize: str | None,
    file: str | Path,
    rows: int = 128,
) -> Checkpoint:
    """Quantize a checkpoint as `quantize` names it, the decoder's 4-bit matrices with GPTQ.

    The model is loaded, on a CPU in float32; see `quantization.calibrate` for the memory that is
    needed beside it.

    Args:
        source: Where the tokenizer and the image settings are.
        quantize: A quantization (`Quantization.parse`) with a 4-bit format for the decoder.
        file: JSONL of rows with image, prefix and suffix.
        rows: Number of rows to read.

    Raises:
        ValueError: An argument is invalid, or rows cannot be used.
    """
    if rows < 1:
        raise ValueError(f"--calibration-rows must be at least 1, got {rows}")
    quantization = Quantization.parse(quantize)
    if quantization.decoder is None or not quantization.decoder.has_blocks:
        raise ValueError(
            "--calibrate requires --quantize with a 4-bit format of the decoder, such as int4, got "
            f"{quantize}"
        )
    quantize_checkpoint(checkpoint, quantization)  # raises for what is quantized otherwise
    processor = make_processor(source, checkpoint.config)
    examples = read_examples(file, partial(_check, processor), rows)
    dtype = "float32" if jax.default_backend() == "cpu" else checkpoint.config.dtype
    model = read_model(checkpoint, replace(checkpoint.config, dtype=dtype))
    with warnings.catch_warnings():  # `checkpoint.notes` has the same, once it is written
        warnings.simplefilter("ignore")
        model = quantize_model(
            model,
            quantization,
            _batches(examples, processor),
            partial(progress_bar, desc="layers", unit="layer"),
        )
    tensors = {
        path: checkpoint.tensors[path] if path in checkpoint.tensors else from_array(array)
        for path, array in parameters(model).items()
    }
    return replace(checkpoint, tensors=tensors, formats=weight_formats(model))


def _check(processor: Processor, example: Example) -> None:
    """Raise a ValueError if the example does not fit the context."""
    rows = processor.encode([list(example.images)], [example.prefix], [example.suffix])
    processor.padded_length(rows)


def _batches(examples: list[Example], processor: Processor) -> Iterator[Inputs]:
    """All rows, padded to the length of the longest, so that one program is compiled."""
    images = [list(example.images) for example in examples]
    prompts = [example.prefix for example in examples]
    suffixes = [example.suffix for example in examples]
    length = max(map(len, processor.encode(images, prompts, suffixes)))
    for start in range(0, len(examples), BATCH):
        batch = slice(start, start + BATCH)
        yield processor(images[batch], prompts[batch], suffixes[batch], length=length)
