"""Weights in 4 and 8 bits: rounding, products, gradients, and models that use them."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.logits import logits

import paligemma_jax as pg
from paligemma_jax.checkpoints.load import load_model
from paligemma_jax.checkpoints.source import TINY
from paligemma_jax.model import codes
from paligemma_jax.model.codes import NF4, decode, dynamic_map, encode, multiply, scales
from paligemma_jax.model.precision import Quantization, WeightFormat
from paligemma_jax.model.stack import stack_model
from paligemma_jax.model.tree import parameters
from paligemma_jax.quantization.modules import QuantizedLinear
from paligemma_jax.quantization.quantize import quantize_model
from tools.quantization_table import accuracy_rows, layer_rows

# The relative error of quantized normal weights, by format.
ERRORS = {
    "int8": 0.0066,
    "int8-bf16": 0.0066,
    "int4-32": 0.096,
    "int4": 0.107,
    "nf4-32": 0.087,
    "nf4": 0.093,
    "nf4-128": 0.097,
    "nf4-64-bf16": 0.093,
    "nf4-64-double": 0.093,
    "int4-32-double": 0.096,
}
FORMATS = list(ERRORS)
EVERY_PART = "nf4-32,embedding=int8,vision=int4-32"


def weight(shape=(32, 6, 64), seed=0):
    return np.random.default_rng(seed).normal(0, 0.02, shape).astype(np.float32)


@pytest.fixture(scope="module")
def bitsandbytes():
    """(torch, bitsandbytes.functional)"""
    reason = "the reference is bitsandbytes: install the test extra"
    torch = pytest.importorskip("torch", reason=reason)
    return torch, pytest.importorskip("bitsandbytes.functional", reason=reason)


def test_nf4_matches_its_definition():
    kernel, format = weight(), WeightFormat("nf4")
    parts = encode(format, jnp.asarray(kernel), 1)
    assert parts["codes"].dtype == jnp.uint8 and parts["codes"].nbytes == kernel.size // 2
    assert parts["scale"].shape == (32, 6, 1)
    blocks = kernel.reshape(-1, 64)
    largest = np.abs(blocks).max(axis=1, keepdims=True)
    nearest = np.abs(blocks[..., None] / largest[..., None] - NF4).argmin(-1)
    packed = (nearest.ravel()[::2] << 4) | nearest.ravel()[1::2]
    np.testing.assert_array_equal(np.asarray(parts["codes"]).ravel(), packed)
    expected = (NF4[nearest] * largest).reshape(kernel.shape)
    np.testing.assert_allclose(decode(format, parts, kernel.shape), expected, rtol=1e-6)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("block", [32, 64, 128])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bits_match_bitsandbytes_bit_for_bit(bitsandbytes, kind, block, double):
    """Codes, largest magnitudes and decoded values, eager and compiled.

    bitsandbytes gets flat arrays: where blocks cross rows, release 0.50.2 reads wrong scales on a
    CPU.
    """
    torch, reference = bitsandbytes
    format = WeightFormat(kind, block, double=double)
    for seed in range(5):
        kernel = weight((192, 320), seed)
        packed, state = reference.quantize_4bit(
            torch.from_numpy(kernel.ravel()),
            blocksize=block,
            quant_type=kind,
            compress_statistics=double,
        )
        parts = encode(format, jnp.asarray(kernel), 1)
        np.testing.assert_array_equal(np.asarray(parts["codes"]).ravel(), packed.numpy().ravel())
        if double:
            parts |= check_double_scales(parts, state)
        expected = reference.dequantize_4bit(packed, state).numpy().reshape(kernel.shape)
        decode_kernel = partial(decode, format, shape=kernel.shape)
        np.testing.assert_array_equal(decode_kernel(parts), expected)
        np.testing.assert_array_equal(jax.jit(decode_kernel)(parts), expected)


def check_double_scales(parts, state):
    """Compare quantized scales with those of bitsandbytes, and return the latter.

    The mean of all scales is summed in another order: its last bit may differ, and with it, at a
    tie, the code of a scale.
    """
    np.testing.assert_array_equal(dynamic_map(), state.state2.code.numpy())
    nested = np.append(state.offset.numpy(), state.state2.absmax.numpy())
    np.testing.assert_allclose(parts["nested"], nested, rtol=1e-6)
    difference = np.asarray(parts["scale"]).ravel().astype(int) - state.absmax.numpy()
    assert np.abs(difference).max() <= 1 and (difference != 0).mean() < 0.01
    scale = jnp.asarray(state.absmax.numpy()).reshape(parts["scale"].shape)
    return {"scale": scale, "nested": jnp.asarray(nested)}


def test_int8_matches_bitsandbytes(bitsandbytes):
    torch, reference = bitsandbytes
    kernel = weight((192, 320)).astype(np.float16)
    expected, largest, _ = reference.int8_vectorwise_quant(torch.from_numpy(kernel))
    parts = encode(WeightFormat("int8"), jnp.asarray(kernel), 1)
    np.testing.assert_allclose(parts["scale"], largest.numpy() / 127, rtol=1e-6)
    assert (np.asarray(parts["codes"]) != expected.numpy()).mean() < 1e-3  # ties


def test_int4_matches_qwix():
    qwix = pytest.importorskip("qwix", reason="the reference is qwix: install the test-core extra")
    kernel = weight((64, 256))
    expected = qwix.quantize(jnp.asarray(kernel), "int4", channelwise_axes=(0,), tiled_axes={1: 32})
    parts = encode(WeightFormat("int4", 32), jnp.asarray(kernel), 1)
    np.testing.assert_allclose(parts["scale"], expected.scale, rtol=1e-6)
    unpacked = np.stack([parts["codes"] >> 4, parts["codes"] & 15], -1)
    unpacked = unpacked.reshape(64, 256).astype(int) - 8
    magnitude = np.abs(kernel / np.repeat(parts["scale"], 32, axis=1))
    inside = magnitude < 7.49  # each block's largest is halfway between two codes
    np.testing.assert_array_equal(unpacked[inside], np.asarray(expected.qvalue).astype(int)[inside])
    assert inside.mean() > 0.96


def test_blocks_may_cross_rows():
    kernel, format = weight((6, 32, 24)), WeightFormat("nf4")
    parts = encode(format, jnp.asarray(kernel), 1)
    flat = encode(format, jnp.asarray(kernel.ravel()), 1)
    assert parts["codes"].shape == (6, 32, 12) and parts["scale"].shape == (72,)
    np.testing.assert_array_equal(parts["codes"].ravel(), flat["codes"])
    decoded, expected = decode(format, parts, kernel.shape), decode(format, flat, (kernel.size,))
    np.testing.assert_array_equal(decoded.ravel(), expected)


@pytest.mark.parametrize("name", FORMATS)
def test_rounding_error_is_as_expected(name):
    kernel, format = weight((32, 6, 128)), WeightFormat.parse(name)
    decoded = decode(format, encode(format, jnp.asarray(kernel), 1), kernel.shape)
    error = np.linalg.norm(decoded - kernel) / np.linalg.norm(kernel)
    assert 0.9 * ERRORS[name] < error < ERRORS[name] * 1.02
    zeros = decode(format, encode(format, jnp.zeros((4, 128)), 1), (4, 128))
    np.testing.assert_array_equal(zeros, 0)


@pytest.mark.parametrize("name", FORMATS)
def test_products_match_the_dense_matrix(name, monkeypatch):
    """Tests products in strips and at once, for one row and several, forward and backward."""
    monkeypatch.setattr(codes, "STRIP_BYTES", 4 * 128 * 10)
    monkeypatch.setattr(codes, "STRIP_ROWS", 10)
    kernel, format = weight((48, 128)), WeightFormat.parse(name)
    parts = encode(format, jnp.asarray(kernel), 1)
    dense, scale = decode(format, parts, kernel.shape), scales(parts)
    for rows in (1, 3):
        x, g = jnp.asarray(weight((rows, 1, 128), 1)), jnp.asarray(weight((rows, 1, 48), 2))
        for product in (multiply, codes._in_strips, codes._at_once):
            y, vjp = jax.vjp(lambda x: product(format, x, parts["codes"], scale), x)  # noqa: B023
            np.testing.assert_allclose(y, x @ dense.T, atol=1e-7)
            np.testing.assert_allclose(vjp(g)[0], g @ dense, atol=1e-7)


@pytest.mark.parametrize("quantization", ["int8", "int4-32", "nf4-64-double", EVERY_PART])
def test_quantizing_while_loading_equals_quantizing_later(quantization):
    loaded = load_model(TINY, quantize=quantization)
    later = quantize_model(load_model(TINY), quantization)
    for path, value in parameters(later).items():
        np.testing.assert_allclose(value, parameters(loaded)[path], rtol=1e-6, err_msg=path)
    stacked = quantize_model(stack_model(load_model(TINY)), quantization)
    np.testing.assert_allclose(logits(stacked), logits(loaded), atol=1e-4)


@pytest.mark.parametrize(
    "shape,contracted",
    [((48, 64), 1), ((48, 80), 1)],  # with 80, blocks of 32 cross rows
)
def test_the_bias_is_added_before_rounding(shape, contracted):
    """In bfloat16 the float32 product plus the bias is rounded once, as in Linear and torch."""
    rng, format = np.random.default_rng(0), WeightFormat.parse("int4-32")
    kernel, bias = weight(shape), jnp.asarray(rng.normal(size=shape[0]), jnp.bfloat16)
    parts = encode(format, jnp.asarray(kernel), contracted)
    x = jnp.asarray(rng.normal(size=(500, shape[1])), jnp.bfloat16)
    axes = "NHD"[: len(shape)]
    y = QuantizedLinear(format, axes, shape, contracted, parts, nnx.Param(bias))(x)
    dense = decode(format, parts, shape).astype(jnp.bfloat16).astype(jnp.float32)
    exact = x.astype(jnp.float32) @ dense.T
    rounded_once = (exact + bias.astype(jnp.float32)).astype(jnp.bfloat16)
    rounded_twice = exact.astype(jnp.bfloat16) + bias
    assert y.dtype == jnp.bfloat16
    assert (y != rounded_once).mean() < 0.02 < (rounded_twice != rounded_once).mean()


def test_sizes_match_arithmetic():
    def nbytes(model, part):
        values = parameters(model).items()
        return sum(value.nbytes for path, value in values if part in path and "norm" not in path)

    size = nbytes(load_model(TINY), "decoder/layers") / 4
    bits = {
        "nf4": 4 + 32 / 64,
        "int4-32": 4 + 32 / 32,
        "nf4-128-bf16": 4 + 16 / 128,
        "nf4-64-double": 4 + 8 / 64,
    }
    for quantization, per_number in bits.items():
        quantized = nbytes(load_model(TINY, quantize=quantization), "decoder/layers")
        assert quantized == pytest.approx(size * per_number / 8, rel=0.01)
    embedder = nbytes(load_model(TINY, quantize="embedding=int8"), "embedder")
    assert embedder == 1664 * (160 + 4)


@pytest.mark.parametrize("name", ["nf4", "int8", "int4-32-double"])
def test_gradients_pass_through_a_quantized_product(name):
    linear = load_model(TINY, quantize=name).decoder.layers[0].mlp.down
    dense = linear.dense(jnp.float32)
    x = jnp.asarray(weight((2, 3, 256)))
    gradient = jax.grad(lambda x: jnp.sum(linear(x) ** 2))(x)
    expected = jax.grad(lambda x: jnp.sum(jnp.einsum("btf,df->btd", x, dense) ** 2))(x)
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-7)


def test_the_embedded_model_still_reads_digits():
    photo = TINY.parent / "digits.jpg"
    for quantization in ("int8", "int8,embedding=int8,vision=int8", "w8a8,vision=w8a8"):
        assert pg.load("tiny", quantize=quantization).generate(photo, "ocr") == ["4 3 2 3"]


@pytest.mark.parametrize(
    "quantization,message",
    [
        ("int2", "quantization must be one of int8, w8a8, int4, nf4, fp4, got 'int2'"),
        ("nf4-48", "quantization block must be one of 32, 64, 128, got 48 in nf4-48"),
        ("int8-double", "int8 has one scale per output and no blocks, got int8-double"),
        ("w8a8-32", "w8a8 has one scale per output and no blocks, got w8a8-32"),
        ("nf4,head=int8", "unknown part 'head'"),
        ("nf4,int8", "decoder is given twice"),
        ("nf4;int8", "unknown quantization 'nf4;int8'"),
        ("cache=int4", "cache must be int8 or none, got 'int4'"),
    ],
)
def test_invalid_quantizations_are_refused(quantization, message):
    with pytest.raises(ValueError, match=message):
        pg.load("tiny", quantize=quantization)


def test_formats_are_written_as_they_are_parsed():
    for name in (*FORMATS, "w8a8", "w8a8-bf16"):
        expected = name if "-" in name or name in ("int8", "w8a8") else f"{name}-64"
        assert str(WeightFormat.parse(name)) == expected


def test_each_part_of_a_model_has_its_format():
    quantization = Quantization.parse("nf4-32,embedding=int8,vision=none,cache=int8")
    assert quantization == Quantization(WeightFormat("nf4", 32), WeightFormat("int8"), None, "int8")
    assert Quantization.parse(None) == Quantization()
    for path in ("decoder/layers/3/mlp/up", "decoder/layers/attention/q"):
        assert quantization.at(path) == quantization.decoder
    assert quantization.at("decoder/embedder") == quantization.embedding
    for path in ("projector", "decoder/layers/3/pre_mlp_norm", "vision/layers/0/mlp/up"):
        assert quantization.at(path) is None


def test_the_table_of_layer_errors(bitsandbytes):
    """The table of docs/quantization.md, on small matrices: the error falls with the number of
    scales, and equals that of bitsandbytes."""
    rows = {row["format"]: row for row in layer_rows("tiny")}
    order = [rows[name]["weights"] for name in ("int8", "nf4-32", "nf4-64", "nf4-128")]
    assert order == sorted(order)
    assert rows["int4-32"]["weights"] < rows["int4-64"]["weights"]
    for name in ("int8", "nf4-32", "nf4-64", "nf4-64-double", "nf4-128"):
        for ours, theirs in (
            ("weights", "bitsandbytes' weights"),
            ("products", "bitsandbytes' products"),
        ):
            assert rows[name][ours] == pytest.approx(rows[name][theirs], rel=2e-3)


@pytest.mark.slow
def test_accuracy_of_the_embedded_model():
    """On held-out digits int8 is within half a point of float32, and nf4 within two points."""
    dense, *rows = accuracy_rows(200, ("int8", "nf4-64", "cache=int8"))
    for row in rows:
        for task in ("ocr exact", "count exact", "detect found"):
            assert row[task] >= dense[task] - (0.02 if row["format"] == "nf4-64" else 0.005)
