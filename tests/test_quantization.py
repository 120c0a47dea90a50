"""Weights in 4 and 8 bits: their rounding, their gradients, and models that hold them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_lora import logits

import paligemma_jax as pg
from paligemma_jax.checkpoint import TINY, load_model
from paligemma_jax.model.layers import parameters
from paligemma_jax.quantization import NF4, dequantize, quantize, quantize_array
from paligemma_jax.synthetic import stacked


def weight(shape=(32, 6, 64), seed=0):
    return np.random.default_rng(seed).normal(0, 0.02, shape).astype(np.float32)


def test_nf4_by_hand():
    """Against its definition, written down again in numpy."""
    kernel = weight()
    codes, scale = quantize_array("nf4", jnp.asarray(kernel), 1)
    assert codes.dtype == jnp.uint8 and codes.nbytes == kernel.size // 2 and scale.shape == (32, 6, 1)
    blocks = kernel.reshape(-1, 64)
    largest = np.abs(blocks).max(axis=1, keepdims=True)
    nearest = np.abs(blocks[..., None] / largest[..., None] - NF4).argmin(-1)
    np.testing.assert_array_equal(np.asarray(codes).ravel(), (nearest.ravel()[::2] << 4) | nearest.ravel()[1::2])
    np.testing.assert_allclose(dequantize("nf4", codes, scale, kernel.shape), (NF4[nearest] * largest).reshape(kernel.shape), rtol=1e-6)


def test_nf4_is_that_of_bitsandbytes():
    torch = pytest.importorskip("torch", reason="the reference is bitsandbytes on torch: install the extra test")
    reference = pytest.importorskip("bitsandbytes.functional", reason="the reference is bitsandbytes: install the extra test")
    for seed in range(5):
        kernel = weight((192, 320), seed)
        packed, state = reference.quantize_4bit(torch.from_numpy(kernel), blocksize=64, quant_type="nf4")
        codes, scale = quantize_array("nf4", jnp.asarray(kernel), 1)
        np.testing.assert_array_equal(np.asarray(codes).ravel(), packed.numpy().ravel())
        np.testing.assert_array_equal(dequantize("nf4", codes, scale, kernel.shape), reference.dequantize_4bit(packed, state).numpy())


def test_nf4_of_an_axis_that_blocks_do_not_divide():
    kernel = weight((6, 32, 24))
    codes, scale = quantize_array("nf4", jnp.asarray(kernel), 1)
    same, flat = quantize_array("nf4", jnp.asarray(kernel.reshape(-1)), 1)
    np.testing.assert_array_equal(codes, same)
    np.testing.assert_array_equal(dequantize("nf4", codes, scale, kernel.shape).ravel(), dequantize("nf4", same, flat, (kernel.size,)))


@pytest.mark.parametrize("kind,error", [("int8", 0.008), ("nf4", 0.1)])
def test_rounding_errors(kind, error):
    kernel = weight()
    found = dequantize(kind, *quantize_array(kind, jnp.asarray(kernel), 1), kernel.shape)
    assert 0.5 * error < np.linalg.norm(found - kernel) / np.linalg.norm(kernel) < error
    zero = dequantize(kind, *quantize_array(kind, jnp.zeros((4, 64)), 1), (4, 64))
    np.testing.assert_array_equal(zero, 0)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantized_while_loading_or_after_listed_or_stacked(kind):
    after, loading = quantize(load_model(TINY), kind), load_model(TINY, quantize=kind)
    for path, value in parameters(after).items():
        np.testing.assert_array_equal(value, parameters(loading)[path], err_msg=path)
    stack = quantize(stacked(load_model(TINY)), kind)
    np.testing.assert_allclose(logits(stack), logits(loading), atol=1e-4)
    plain = parameters(load_model(TINY))
    held = sum(v.nbytes for p, v in parameters(loading).items() if "decoder/layers" in p and "norm" not in p)
    assert held < (0.15 if kind == "nf4" else 0.27) * sum(v.nbytes for p, v in plain.items() if "decoder/layers" in p and "norm" not in p)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_gradients_pass_through(kind):
    """To what comes before a quantized product: those of its dense twin."""
    small = load_model(TINY, quantize=kind).decoder.layers[0].mlp.down
    x = jnp.asarray(weight((2, 3, 256)))
    found = jax.grad(lambda x: jnp.sum(small(x) ** 2))(x)
    expected = jax.grad(lambda x: jnp.sum(jnp.einsum("btf,df->btd", x, small.dense(jnp.float32)) ** 2))(x)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-7)


def test_it_still_reads():
    photo = TINY.parent / "digits.jpg"
    assert pg.load("tiny", quantize="int8").generate(photo, "ocr") == ["4 3 2 3"]
    with pytest.raises(ValueError, match="unknown quantization 'int2'"):
        pg.load("tiny", quantize="int2")
