"""GPTQ: codes that are chosen for the inputs of a layer."""

from __future__ import annotations

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import paligemma_jax as pg
from paligemma_jax.checkpoints.load import load_model
from paligemma_jax.checkpoints.source import TINY
from paligemma_jax.cli import main
from paligemma_jax.model.codes import decode, encode
from paligemma_jax.model.precision import WeightFormat
from paligemma_jax.model.stack import stack_model
from paligemma_jax.model.tree import parameters
from paligemma_jax.quantization.gptq import encode_calibrated
from paligemma_jax.quantization.quantize import quantize_model, weight_formats
from paligemma_jax.tiny.questions import heldout_examples
from tools.quantization_table import accuracy_rows


def correlated(rows, size, seed):
    """Inputs [rows, size] with correlated columns of different sizes."""
    mix = np.random.default_rng(0).normal(size=(size // 4, size)) * np.geomspace(0.1, 2, size)
    rng = np.random.default_rng(seed)
    noise = 0.1 * rng.normal(size=(rows, size))
    return jnp.asarray(rng.normal(size=(rows, size // 4)) @ mix + noise, jnp.float32)


@pytest.mark.parametrize(
    "name, shape",
    [
        ("int4", (48, 256)),
        ("int4-64-bf16", (48, 160)),  # blocks cross rows
        ("nf4-64-double", (48, 4, 64)),  # two axes of inputs
    ],
)
def test_calibration_lowers_the_error_of_other_inputs(name, shape):
    format, size = WeightFormat.parse(name), int(np.prod(shape[1:]))
    kernel = jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)
    x, other = correlated(1000, size, seed=2), correlated(200, size, seed=3)

    def error(parts):
        difference = (decode(format, parts, shape) - kernel).reshape(len(kernel), -1)
        return float(jnp.linalg.norm(other @ difference.T))

    rounded = encode(format, kernel, len(shape) - 1)
    calibrated = encode_calibrated(format, kernel, x.T @ x)
    assert error(calibrated) < 0.5 * error(rounded)
    assert error(encode_calibrated(format, kernel, jnp.eye(size))) > 0.7 * error(rounded)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), calibrated) == jax.tree.map(
        lambda a: (a.shape, a.dtype), rounded
    )


def test_an_input_that_is_always_zero_and_a_matrix_of_zeros():
    format, x = WeightFormat("int4"), correlated(100, 256, seed=2).at[:, 5].set(0)
    kernel = jnp.asarray(np.random.default_rng(1).normal(size=(48, 256)), jnp.float32)
    parts = encode_calibrated(format, kernel, x.T @ x)
    error = jnp.abs(decode(format, parts, kernel.shape) - kernel)[:, 5]
    assert error.max() < 0.3
    zeros = encode_calibrated(format, jnp.zeros((48, 256)), x.T @ x)
    np.testing.assert_array_equal(decode(format, zeros, (48, 256)), 0)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A JSONL file of 24 questions about digits."""
    folder, lines = tmp_path_factory.mktemp("rows"), []
    for i, (image, prompt, answer) in enumerate(heldout_examples("ocr", 24, seed=1)):
        Image.fromarray(image).save(folder / f"{i}.png")
        lines.append(json.dumps({"image": f"{i}.png", "prefix": prompt, "suffix": answer}))
    file = folder / "rows.jsonl"
    file.write_text("\n".join(lines))
    return file


def convert(directory, *options):
    main(["convert", str(TINY), str(directory), *map(str, options)])


@pytest.mark.thorough
def test_a_calibrated_checkpoint(rows, tmp_path, capsys):
    """It has the formats of one that is rounded, and a smaller error."""
    convert(tmp_path / "new", "--quantize", "int4,embedding=int8", "--calibrate", rows, "--verify")
    output = capsys.readouterr()
    assert "verified" in output.out and "layers: 4/4" in output.err
    rounded = load_model(TINY, quantize="int4,embedding=int8")
    calibrated = load_model(tmp_path / "new")
    assert weight_formats(calibrated) == weight_formats(rounded)
    before, after = parameters(rounded), parameters(calibrated)
    assert {path: (a.shape, a.dtype) for path, a in before.items()} == {
        path: (a.shape, a.dtype) for path, a in after.items()
    }
    np.testing.assert_array_equal(before["decoder/embedder/codes"], after["decoder/embedder/codes"])
    images, prompts, answers = map(list, zip(*heldout_examples("ocr", 8), strict=True))
    predictor = pg.load("tiny")

    def logits(model):
        values, inputs = replace(predictor, model=model).logits(images, prompts, answers)
        return values[inputs.targets]

    expected = logits(predictor.model)
    before, after = (np.linalg.norm(logits(m) - expected) for m in (rounded, calibrated))
    assert after < 0.7 * before


@pytest.mark.parametrize(
    "options, message",
    [
        (("--quantize", "int8"), "--calibrate requires --quantize with a 4-bit format"),
        ((), "--calibrate requires --quantize with a 4-bit format"),
        (
            ("--quantize", "int4", "--calibration-rows", 0),
            "--calibration-rows must be at least 1, got 0",
        ),
        (("--quantize", "int4", "--calibrate", "nothing.jsonl"), "nothing.jsonl: no such file"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(rows, options, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        convert(tmp_path / "new", "--to", "jax", "--calibrate", rows, *options)
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_calibration_needs_batches_and_layers_as_a_list():
    model = load_model(TINY)
    with pytest.raises(ValueError, match="calibration must have at least one batch"):
        quantize_model(model, "int4", [])
    with pytest.raises(ValueError, match="calibration requires the layers as a list"):
        quantize_model(stack_model(model, delete=False), "int4", [])
    with pytest.raises(ValueError, match="calibration requires a 4-bit format of the decoder"):
        quantize_model(model, "int8", [])


@pytest.mark.slow
def test_accuracy_of_the_embedded_model():
    """The logit error of int4-64 falls from 0.072 to less than half."""
    _, row = accuracy_rows(200, ["int4-64"], calibrate=128)
    assert row["logits"] < 0.035 and row["ocr exact"] >= 0.99
