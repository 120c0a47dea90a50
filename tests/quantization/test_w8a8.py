"""Products of 8-bit integers: rounding of rows, sums, gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.logits import logits

from paligemma_jax.checkpoints.load import load_model
from paligemma_jax.checkpoints.source import TINY
from paligemma_jax.model.codes import encode
from paligemma_jax.model.precision import WeightFormat
from paligemma_jax.quantization import w8a8
from paligemma_jax.quantization.modules import QuantizedLinear
from paligemma_jax.quantization.quantize import quantize_model

FORMAT = WeightFormat("w8a8")


@pytest.fixture(params=["cpu", "accelerator"])
def multiply(request, monkeypatch):
    """`multiply_rounded`, as a CPU or as an accelerator computes it."""
    if request.param == "accelerator":
        monkeypatch.setattr(
            jax.lax, "platform_dependent", lambda *operands, default, **others: default(*operands)
        )
    return w8a8.multiply_rounded


def random_product(rows=(3, 5), seed=0):
    """x whose rows differ much in size, and the codes and scales of a matrix [48, 320]."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(*rows, 320)) * np.exp(rng.normal(size=(*rows, 1), scale=3))
    kernel = jnp.asarray(rng.normal(size=(48, 320)), jnp.float32)
    parts = encode(FORMAT, kernel, 1)
    return jnp.asarray(x, jnp.float32), parts["codes"], parts["scale"]


def integer_product(x, codes, scale):
    """The definition, in int64 and float64."""
    x, codes = np.asarray(x, np.float64), np.asarray(codes, np.int64)
    step = np.abs(x).max(axis=-1, keepdims=True) / 127
    rounded = np.rint(x / np.where(step, step, 1)).astype(np.int64)
    return (rounded @ codes.T) * step * np.asarray(scale)


def test_products_are_those_of_integers(multiply):
    x, codes, scale = random_product()
    x = x.at[0, 0].set(0)
    y = multiply(x, codes, scale)
    expected = integer_product(x, codes, scale)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())
    assert not y[0, 0].any()
    exact = np.asarray(x) @ (np.asarray(codes) * np.asarray(scale)[:, None]).T
    error = np.linalg.norm(y - exact, axis=-1)[1:] / np.linalg.norm(exact, axis=-1)[1:]
    assert error.min() > 0.001 and error.max() < 0.02  # every row, small or large


def test_a_row_does_not_depend_on_the_others(multiply):
    x, codes, scale = random_product()
    alone = multiply(x[1:2, 2:3], codes, scale)
    np.testing.assert_allclose(multiply(x, codes, scale)[1, 2], alone[0, 0], rtol=1e-5)


def test_the_gradient_is_a_product_of_integers_too(multiply):
    x, codes, scale = random_product()
    y_bar = jnp.asarray(np.random.default_rng(1).normal(size=(3, 5, 48)), jnp.float32)
    (gradient,) = jax.vjp(lambda x: multiply(x, codes, scale), x)[1](y_bar)
    expected = integer_product(y_bar * scale, codes.T, 1.0)
    atol = 1e-6 * np.abs(expected).max()
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=atol)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_layer_rounds_its_input(dtype):
    x, codes, scale = random_product()
    x = x.astype(dtype)
    bias = jnp.asarray(np.random.default_rng(2).normal(size=48), dtype)
    parts = {"codes": codes, "scale": scale}
    y = QuantizedLinear(FORMAT, "FD", (48, 320), 1, parts, nnx.Param(bias))(x)
    expected = w8a8.multiply_rounded(x.astype(jnp.float32), codes, scale) + bias
    assert y.dtype == dtype
    np.testing.assert_array_equal(y, expected.astype(dtype))


def test_the_embedded_model_is_as_close_as_with_int8_weights_alone():
    dense = load_model(TINY)
    expected = logits(dense)

    def error(quantization):
        difference = logits(quantize_model(dense, quantization)) - expected
        return np.linalg.norm(difference) / np.linalg.norm(expected)

    # Two roundings of 8 bits instead of one: the errors are of the same order.
    assert error("int8") < error("w8a8") < 2.5 * error("int8")
