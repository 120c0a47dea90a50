"""The tables of docs/quantization.md. Run from the root of the repository:

    python -m tools.quantization_table --scenes 300
    python -m tools.quantization_table --scenes 300 --calibrate 128 --quantize int4-64
    python -m tools.quantization_table --layer 3b-224

For speed, see `paligemma-jax bench --quantize none int8 nf4`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from convert.quantized import quantizable_matrices
from paligemma_jax import Predictor, load
from paligemma_jax.data.progress import progress_bar
from paligemma_jax.inference.generate import encode_images
from paligemma_jax.model.codes import decode, encode
from paligemma_jax.model.config import PaliGemmaConfig
from paligemma_jax.model.precision import Quantization, WeightFormat
from paligemma_jax.processing.image import ImageSource
from paligemma_jax.quantization.quantize import quantize_model
from paligemma_jax.tiny.digits import glyphs
from paligemma_jax.tiny.questions import ask, choose_digit, heldout_examples, score_answers
from paligemma_jax.tiny.scenes import compose

FORMATS = ("int8", "int4-32", "int4-64", "nf4-32", "nf4-64", "nf4-64-double", "nf4-128")
QUANTIZATIONS = (
    *FORMATS,
    *("w8a8", "w8a8,vision=w8a8,embedding=int8"),
    *("embedding=int8", "embedding=nf4-32", "vision=int8", "vision=nf4", "cache=int8"),
    "int8,embedding=int8,vision=int8",
    "nf4,embedding=int8,vision=int8",
    "nf4,embedding=int8,vision=int8,cache=int8",
)
TASKS = ("ocr", "count", "detect")

Row = dict[str, float | str]


def accuracy_rows(
    scenes: int,
    quantizations: Sequence[str] = QUANTIZATIONS,
    model: str = "tiny",
    dtype: str | None = None,
    calibrate: int = 0,
) -> Iterator[Row]:
    """Yield a row for the dense model and for each quantization: bytes of the model, fraction of
    exact answers, of boxes found and of spurious boxes, and the relative error of
    `decoded_logits`. With `calibrate`, the decoder is quantized for this many training rows."""
    if scenes < 1:
        raise ValueError(f"--scenes must be at least 1, got {scenes}")
    for quantization in quantizations:
        Quantization.parse(quantization)  # raises for an invalid name before anything is measured
    examples = {
        task: tuple(map(list, zip(*heldout_examples(task, scenes), strict=True))) for task in TASKS
    }
    dense = None
    for quantization in ("none", *(name for name in quantizations if name != "none")):
        if calibrate and quantization != "none":
            predictor = load(model, dtype=dtype)
            batches = [predictor.processor(*training_examples(calibrate))]
            quantized = quantize_model(predictor.model, quantization, batches)
            predictor = replace(predictor, model=quantized)
        else:
            predictor = load(model, quantize=quantization, dtype=dtype)
        logits = decoded_logits(predictor, *(column[:16] for column in examples["ocr"]))
        dense = logits if dense is None else dense
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(predictor.model))
        row: Row = {"format": quantization, "bytes": size}
        for task, (images, prompts, references) in examples.items():
            answers = predictor.generate(images, prompts, 48, progress=False)
            scores = score_answers(task, answers, references)
            if task == "detect":
                del scores["exact"]
            row |= {f"{task} {name}": value for name, value in scores.items()}
        error = np.linalg.norm(logits - dense) / np.linalg.norm(dense)
        yield row | {"logits": float(error)}


def training_examples(rows: int, seed: int = 1) -> tuple[list[ImageSource], list[str], list[str]]:
    """Images, prompts and answers about digits that training sees, of four tasks by turns."""
    rng = np.random.default_rng(seed)
    scenes = compose(rng, glyphs(held_out=False), rows)
    tasks = [("caption", *TASKS)[i % 4] for i in range(rows)]
    digits = [choose_digit(rng, scenes.digits(i)) for i in range(rows)]
    pairs = [ask(scenes, i, task, digits[i]) for i, task in enumerate(tasks)]
    prompts, answers = map(list, zip(*pairs, strict=True))
    return list(scenes.images), prompts, answers


def decoded_logits(
    predictor: Predictor, images: list[ImageSource], prompts: list[str], answers: list[str]
) -> np.ndarray:
    """float32[n, B, V]: the logits of the first n tokens of the answers (n as in the shortest),
    each decoded from a cache with those before it."""
    encoded = predictor.processor.encode(images, prompts, answers)
    inputs, model = predictor.processor(images, prompts), predictor.model
    n = min(len(row.suffix) for row in encoded)
    prefill = jax.jit(type(model).prefill, static_argnames="slots")
    step = jax.jit(type(model).decode_step)
    features = encode_images(model, inputs.images)
    slots = inputs.tokens.shape[1] + n
    logits, cache = prefill(
        model, inputs.tokens, features, inputs.valid, inputs.prefix, slots=slots
    )
    steps = [logits]
    for token in np.array([row.suffix[: n - 1] for row in encoded], np.int32).T:
        logits, cache = step(model, token, cache)
        steps.append(logits)
    return np.stack(steps)


def layer_rows(preset: str, columns: int = 8, seed: int = 0) -> Iterator[Row]:
    """Yield a row for each format: bits per weight, and the relative errors of weights and of
    products, root mean square over the matrices of one decoder layer.

    The weights are normal. Beside them are the errors of bitsandbytes on the same weights, where it
    is installed and has the format.

    Args:
        preset: Preset with the shapes of the layer.
        columns: Vectors that each matrix is multiplied with.
        seed: Seed of weights and vectors.
    """
    rng, config = np.random.default_rng(seed), PaliGemmaConfig.preset(preset)
    pairs = []
    for matrix in quantizable_matrices(config).values():
        if matrix.module.startswith("decoder/layers/0/"):
            outputs = math.prod(matrix.shape[: -matrix.contracted])
            inputs = math.prod(matrix.shape[-matrix.contracted :])
            weights = rng.standard_normal((outputs, inputs), np.float32)
            weights *= np.float32(inputs**-0.5)
            pairs.append((weights, rng.standard_normal((inputs, columns), np.float32)))
    sizes = [weights.size for weights, _ in pairs]
    names = ("weights", "products", "bitsandbytes' weights", "bitsandbytes' products")
    for name in FORMATS:
        format = WeightFormat.parse(name)
        measured = np.array([_measure(format, weights, x) for weights, x in pairs])
        means = np.average(measured[:, 1:], axis=0, weights=sizes)
        bits = 8 * measured[:, 0].sum() / sum(sizes)
        yield {"format": name, "bits": bits} | dict(zip(names, means.tolist(), strict=True))


def _measure(format: WeightFormat, weights: np.ndarray, x: np.ndarray) -> tuple[float, ...]:
    """Bytes, our errors of weights and product, and bitsandbytes' errors."""
    parts = encode(format, jnp.asarray(weights), 1)
    size = sum(part.nbytes for part in parts.values())
    ours = np.asarray(decode(format, parts, weights.shape))
    theirs = _bitsandbytes(format, weights)
    nan = (math.nan, math.nan)
    return (
        size,
        *_errors(ours, weights, x),
        *(nan if theirs is None else _errors(theirs, weights, x)),
    )


def _errors(ours: np.ndarray, exact: np.ndarray, x: np.ndarray) -> tuple[float, float]:
    norm = np.linalg.norm
    product = exact @ x
    return float(norm(ours - exact) / norm(exact)), float(norm(ours @ x - product) / norm(product))


def _bitsandbytes(format: WeightFormat, weights: np.ndarray) -> np.ndarray | None:
    """The weights quantized and dequantized by bitsandbytes; None if it has no such format or is
    not installed."""
    if format.kind == "int4" or not find_spec("bitsandbytes"):
        return None
    import torch
    from bitsandbytes import functional

    if format.kind == "int8":
        codes, largest, _ = functional.int8_vectorwise_quant(torch.from_numpy(weights).half())
        return functional.int8_vectorwise_dequant(codes, largest).numpy()
    # Flat: on a CPU, version 0.50.2 reads wrong scales where blocks cross rows.
    codes, state = functional.quantize_4bit(
        torch.from_numpy(weights.ravel()),
        blocksize=format.block,
        quant_type="nf4",
        compress_statistics=format.double,
    )
    return functional.dequantize_4bit(codes, state).numpy().reshape(weights.shape)


def _cell(value: float | str) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def print_table(
    scenes: int = 300,
    quantize: tuple[str, ...] = QUANTIZATIONS,
    model: str = "tiny",
    dtype: str | None = None,
    calibrate: int = 0,
    layer: str | None = None,
) -> None:
    """Print a table of what quantization costs: accuracy on held-out digits, or, with --layer, the
    errors of one layer.

    Args:
        scenes: Scenes for each task.
        quantize: Quantizations to compare with the dense model.
        model: Checkpoint.
        dtype: Dtype of the dense parameters; by default float32 on a CPU, else the checkpoint's.
        calibrate: Quantize the decoder for this many rows about training digits; 0 rounds.
        layer: Measure a decoder layer of this preset, such as 3b-224.
    """
    rows = layer_rows(layer) if layer else accuracy_rows(scenes, quantize, model, dtype, calibrate)
    for number, row in enumerate(progress_bar(rows, "formats", unit="format")):
        if number == 0:
            print("| " + " | ".join(row) + " |\n" + "|---" * len(row) + "|")
        print("| " + " | ".join(map(_cell, row.values())) + " |", flush=True)


if __name__ == "__main__":
    from paligemma_jax.errors import report_errors

    report_errors(lambda: tyro.cli(print_table, prog="python -m tools.quantization_table"))
