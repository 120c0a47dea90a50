"""Weights in 4 and 8 bits: their rounding, their products and gradients, and models that hold them."""

from __future__ import annotations

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
from tools.quantization_table import answers, layer

KINDS = ["int8", "int8-bf16", "int4-32", "int4", "nf4-32", "nf4", "nf4-128", "nf4-64-bf16", "nf4-64-double", "int4-32-double"]
EVERYWHERE = "nf4-32,embedding=int8,vision=int4-32"


def weight(shape=(32, 6, 64), seed=0):
    return np.random.default_rng(seed).normal(0, 0.02, shape).astype(np.float32)


def test_nf4_by_hand():
    """Against its definition, written down again in numpy."""
    kernel = weight()
    parts = encode(WeightFormat("nf4"), jnp.asarray(kernel), 1)
    assert parts["codes"].dtype == jnp.uint8 and parts["codes"].nbytes == kernel.size // 2 and parts["scale"].shape == (32, 6, 1)
    blocks = kernel.reshape(-1, 64)
    largest = np.abs(blocks).max(axis=1, keepdims=True)
    nearest = np.abs(blocks[..., None] / largest[..., None] - NF4).argmin(-1)
    np.testing.assert_array_equal(np.asarray(parts["codes"]).ravel(), (nearest.ravel()[::2] << 4) | nearest.ravel()[1::2])
    np.testing.assert_allclose(decode(WeightFormat("nf4"), parts, kernel.shape), (NF4[nearest] * largest).reshape(kernel.shape), rtol=1e-6)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("block", [32, 64, 128])
def test_nf4_is_that_of_bitsandbytes(block, double):
    """Codes and largest magnitudes, and the numbers they stand for, to the bit, eager and compiled.

    Flat there: in rows that blocks run over, bitsandbytes 0.50.2 reads the scales of others on a CPU.
    """
    torch = pytest.importorskip("torch", reason="the reference is bitsandbytes on torch: install the extra test")
    reference = pytest.importorskip("bitsandbytes.functional", reason="the reference is bitsandbytes: install the extra test")
    format = WeightFormat("nf4", block, double=double)
    for seed in range(5):
        kernel = weight((192, 320), seed)
        packed, state = reference.quantize_4bit(torch.from_numpy(kernel.ravel()), blocksize=block, quant_type="nf4", compress_statistics=double)
        parts = encode(format, jnp.asarray(kernel), 1)
        np.testing.assert_array_equal(np.asarray(parts["codes"]).ravel(), packed.numpy().ravel())
        if double:  # the mean of all scales is summed in another order: a bit of it, and at a tie the code of a scale, may differ
            np.testing.assert_array_equal(dynamic_map(), state.state2.code.numpy())
            nested = np.append(state.offset.numpy(), state.state2.absmax.numpy())
            np.testing.assert_allclose(parts["nested"], nested, rtol=1e-6)
            away = np.asarray(parts["scale"]).ravel().astype(int) - state.absmax.numpy()
            assert np.abs(away).max() <= 1 and (away != 0).mean() < 0.01
            parts |= {"scale": jnp.asarray(state.absmax.numpy()).reshape(parts["scale"].shape), "nested": jnp.asarray(nested)}
        expected = reference.dequantize_4bit(packed, state).numpy().reshape(kernel.shape)
        np.testing.assert_array_equal(decode(format, parts, kernel.shape), expected)
        np.testing.assert_array_equal(jax.jit(lambda parts: decode(format, parts, kernel.shape))(parts), expected)  # noqa: B023


def test_int8_is_that_of_bitsandbytes():
    torch = pytest.importorskip("torch", reason="the reference is bitsandbytes on torch: install the extra test")
    reference = pytest.importorskip("bitsandbytes.functional", reason="the reference is bitsandbytes: install the extra test")
    kernel = weight((192, 320)).astype(np.float16)
    found, largest, _ = reference.int8_vectorwise_quant(torch.from_numpy(kernel))
    parts = encode(WeightFormat("int8"), jnp.asarray(kernel), 1)
    np.testing.assert_allclose(parts["scale"], largest.numpy() / 127, rtol=1e-6)
    assert (np.asarray(parts["codes"]) != found.numpy()).mean() < 1e-3  # ties


def test_int4_is_that_of_qwix():
    qwix = pytest.importorskip("qwix", reason="the reference is qwix: install the extra test-core")
    kernel = weight((64, 256))
    expected = qwix.quantize(jnp.asarray(kernel), "int4", channelwise_axes=(0,), tiled_axes={1: 32})
    parts = encode(WeightFormat("int4", 32), jnp.asarray(kernel), 1)
    np.testing.assert_allclose(parts["scale"], expected.scale, rtol=1e-6)
    found = np.stack([parts["codes"] >> 4, parts["codes"] & 15], -1).reshape(64, 256).astype(int) - 8
    away = np.abs(kernel / np.repeat(parts["scale"], 32, axis=1))
    inside = away < 7.49  # each block's largest lies half way between two codes
    np.testing.assert_array_equal(found[inside], np.asarray(expected.qvalue).astype(int)[inside])
    assert inside.mean() > 0.96


def test_blocks_that_run_over_rows():
    kernel = weight((6, 32, 24))
    parts, flat = (encode(WeightFormat("nf4"), jnp.asarray(kernel.reshape(shape)), 1) for shape in ((6, 32, 24), (-1,)))
    assert parts["codes"].shape == (6, 32, 12) and parts["scale"].shape == (72,)
    np.testing.assert_array_equal(parts["codes"].ravel(), flat["codes"])
    np.testing.assert_array_equal(decode(WeightFormat("nf4"), parts, kernel.shape).ravel(), decode(WeightFormat("nf4"), flat, (kernel.size,)))


ERRORS = {"int8": 0.0066, "int8-bf16": 0.0066, "int4-32": 0.096, "int4": 0.107, "nf4-32": 0.087, "nf4": 0.093, "nf4-128": 0.097}  # normal weights
ERRORS |= {"nf4-64-bf16": 0.093, "nf4-64-double": 0.093, "int4-32-double": 0.096}


@pytest.mark.parametrize("kind", KINDS)
def test_rounding_errors(kind):
    kernel, format = weight((32, 6, 128)), WeightFormat.parse(kind)
    found = decode(format, encode(format, jnp.asarray(kernel), 1), kernel.shape)
    assert 0.9 * ERRORS[kind] < np.linalg.norm(found - kernel) / np.linalg.norm(kernel) < ERRORS[kind] * 1.02
    np.testing.assert_array_equal(decode(format, encode(format, jnp.zeros((4, 128)), 1), (4, 128)), 0)


@pytest.mark.parametrize("kind", KINDS)
def test_products(kind, monkeypatch):
    """In strips and at once, of one row and of several, forward and backward: those with the dense matrix."""
    monkeypatch.setattr(codes, "STRIP_BYTES", 4 * 128 * 10)
    monkeypatch.setattr(codes, "STRIP_ROWS", 10)
    kernel, format = weight((48, 128)), WeightFormat.parse(kind)
    parts = encode(format, jnp.asarray(kernel), 1)
    dense, scale = decode(format, parts, kernel.shape), scales(parts)
    for rows in (1, 3):
        x, g = jnp.asarray(weight((rows, 1, 128), 1)), jnp.asarray(weight((rows, 1, 48), 2))
        for how in (multiply, codes._in_strips, codes._at_once):
            y, back = jax.vjp(lambda x: how(format, x, parts["codes"], scale), x)  # noqa: B023
            np.testing.assert_allclose(y, x @ dense.T, atol=1e-7)
            np.testing.assert_allclose(back(g)[0], g @ dense, atol=1e-7)


@pytest.mark.parametrize("how", ["int8", "int4-32", "nf4-64-double", EVERYWHERE])
def test_quantized_while_loading_or_after_listed_or_stacked(how):
    after, loading = quantize_model(load_model(TINY), how), load_model(TINY, quantize=how)
    for path, value in parameters(after).items():
        np.testing.assert_allclose(value, parameters(loading)[path], rtol=1e-6, err_msg=path)
    stack = quantize_model(stack_model(load_model(TINY)), how)
    np.testing.assert_allclose(logits(stack), logits(loading), atol=1e-4)


@pytest.mark.parametrize("shape,contracted", [((48, 64), 1), ((48, 80), 1)])  # 80: blocks of 32 run over the ends of rows
def test_a_bias_is_added_before_rounding(shape, contracted):
    """In bfloat16: the float32 product, plus the bias, rounded once, as an `Einsum` and torch do."""
    rng, format = np.random.default_rng(0), WeightFormat.parse("int4-32")
    kernel, bias = weight(shape), jnp.asarray(rng.normal(size=shape[0]), jnp.bfloat16)
    parts = encode(format, jnp.asarray(kernel), contracted)
    x = jnp.asarray(rng.normal(size=(500, shape[1])), jnp.bfloat16)
    found = QuantizedLinear(format, "NHD"[: len(shape)], shape, contracted, parts, nnx.Param(bias))(x)
    wide = decode(format, parts, shape).astype(jnp.bfloat16).astype(jnp.float32)
    expected = (x.astype(jnp.float32) @ wide.T + bias.astype(jnp.float32)).astype(jnp.bfloat16)
    twice = (x.astype(jnp.float32) @ wide.T).astype(jnp.bfloat16) + bias
    assert found.dtype == jnp.bfloat16 and (found != expected).mean() < 0.02 < (twice != expected).mean()


def test_bytes_are_as_arithmetic_says():
    of = lambda model, where: sum(v.nbytes for p, v in parameters(model).items() if where in p and "norm" not in p)
    numbers = of(load_model(TINY), "decoder/layers") / 4
    bits = {"nf4": 4 + 32 / 64, "int4-32": 4 + 32 / 32, "nf4-128-bf16": 4 + 16 / 128, "nf4-64-double": 4 + 8 / 64}
    for how, each in bits.items():
        assert of(load_model(TINY, quantize=how), "decoder/layers") == pytest.approx(numbers * each / 8, rel=0.01)
    assert of(load_model(TINY, quantize="embedding=int8"), "embedder") == 1664 * (160 + 4)


@pytest.mark.parametrize("kind", ["nf4", "int8", "int4-32-double"])
def test_gradients_pass_through(kind):
    """To what comes before a quantized product: those of its dense twin."""
    small = load_model(TINY, quantize=kind).decoder.layers[0].mlp.down
    x = jnp.asarray(weight((2, 3, 256)))
    found = jax.grad(lambda x: jnp.sum(small(x) ** 2))(x)
    expected = jax.grad(lambda x: jnp.sum(jnp.einsum("btf,df->btd", x, small.dense(jnp.float32)) ** 2))(x)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-7)


def test_it_still_reads():
    photo = TINY.parent / "digits.jpg"
    for how in ("int8", "int8,embedding=int8,vision=int8"):
        assert pg.load("tiny", quantize=how).generate(photo, "ocr") == ["4 3 2 3"]


@pytest.mark.parametrize(
    "how,expected",
    [
        ("int2", "unknown quantization 'int2'; there are int8, int4, nf4"),
        ("nf4-48", "no quantization nf4-48: 4-bit ones have blocks of 32, 64, 128"),
        ("int8-double", "no quantization int8-double"),
        ("nf4,head=int8", "head is no part of a model"),
        ("nf4,int8", "decoder twice"),
        ("nf4;int8", "unknown quantization 'nf4;int8'"),
        ("cache=int4", "the cache is held in int8 or none"),
    ],
)
def test_what_there_is_not(how, expected):
    with pytest.raises(ValueError, match=expected):
        pg.load("tiny", quantize=how)


def test_names():
    for name in KINDS:
        assert str(WeightFormat.parse(name)) == (name if "-" in name or name == "int8" else f"{name}-64")
    how = Quantization.parse("nf4-32,embedding=int8,vision=none,cache=int8")
    assert how == Quantization(WeightFormat("nf4", 32), WeightFormat("int8"), None, "int8") and Quantization.parse(None) == Quantization()
    assert how.at("decoder/layers/3/mlp/up") == how.at("decoder/layers/attention/q") == how.decoder and how.at("decoder/embedder") == how.embedding
    assert how.at("projector") is how.at("decoder/layers/3/pre_mlp_norm") is how.at("vision/layers/0/mlp/up") is None


def test_errors_of_a_layer():
    """The table of docs/quantization.md, on small matrices: fewer numbers to a scale err less, and bitsandbytes' own error is beside ours."""
    pytest.importorskip("bitsandbytes", reason="the reference is bitsandbytes: install the extra test")
    rows = {row["held"]: row for row in layer("tiny")}
    order = [rows[name]["weights"] for name in ("int8", "nf4-32", "nf4-64", "nf4-128")]
    assert order == sorted(order) and rows["int4-32"]["weights"] < rows["int4-64"]["weights"]
    for name in ("int8", "nf4-32", "nf4-64", "nf4-64-double", "nf4-128"):
        for ours, theirs in (("weights", "bitsandbytes' weights"), ("products", "its products")):
            assert rows[name][ours] == pytest.approx(rows[name][theirs], rel=2e-3)


@pytest.mark.slow
def test_answers_of_tiny():
    """On digits that it never saw, int8 within half a point of what it says in float32, nf4 within two."""
    dense, *rest = answers(200, ("int8", "nf4-64", "cache=int8"))
    for row in rest:
        for task in ("ocr exact", "count exact", "detect found"):
            assert row[task] >= dense[task] - (0.02 if row["held"] == "nf4-64" else 0.005)
