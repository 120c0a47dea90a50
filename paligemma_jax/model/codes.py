"""Matrices as codes and scales: what they are made of, what they say, and products with them. Arrays in, arrays out.

    int8   one scale for each output: code * scale, |code| <= 127 (the weights of LLM.int8, arXiv:2208.07339, in bitsandbytes)
    int4   one for each block of numbers in the order of memory: code * scale, -8 <= code <= 7, scale = largest / 7.5 (as in qwix)
    nf4    the same blocks, each divided by its largest magnitude and rounded to the nearest of 16 values (QLoRA, arXiv:2305.14314; bitsandbytes)

Two 4-bit codes to the byte, the first in the high bits. The parts of a matrix [out..., in...] whose last axis is X, by name:

    codes    int8 [out..., in...], or uint8 [..., X/2]
    scale    float32 or bfloat16 [out...], or [..., X/block], but flat [blocks] where the block does not divide X; uint8 if it is quantized too
    nested   only then, float32 [1 + blocks/256]: the mean of the scales, and the largest distance from it in every 256 of them (QLoRA)

So codes and scales keep the matrix's axes, and can be spread over devices as it is. A stack's leading axes come first in each part.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from paligemma_jax.model.precision import Format

NEST = 256  # scales to a scale of theirs
STRIP = 2**22  # bytes of rows that a CPU makes wide at once, so that they are multiplied before they leave its cache
ROWS = 128  # of 4-bit codes for a single x, which is sooner done with them: nf4 in 2.9 ms for 3.7, int4 in 1.6 for 2.1 (docs/quantization.md)

# Quantiles of N(0, 1), scaled to [-1, 1], with an exact 0 (bitsandbytes `get_4bit_type`).
NF4 = np.array(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
     0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
     0.7229568362236023, 1.0], np.float32,
)  # fmt: skip


@cache
def dynamic() -> np.ndarray:
    """float32[256]: what the codes of quantized scales say, bitsandbytes' `create_dynamic_map` (arXiv:1511.04561) to the bit.

    Seven decades of both signs, each twice as fine as the one below. In float64: torch's `linspace` multiplies and adds in one rounding.
    """
    values = [np.array([0, 1], np.float32)]
    for decade in range(7):
        n = 2**decade
        low, step, k = float(np.float32(0.1)), float((np.float32(1) - np.float32(0.1)) / np.float32(n)), np.arange(n + 1)
        edges = np.where(k < (n + 1) // 2, low + step * k, 1 - step * (n - k)).astype(np.float32)
        middle = (edges[:-1] + edges[1:]) / 2 * np.float32(10.0 ** (decade - 6))
        values += [middle, -middle]
    return np.sort(np.concatenate(values))


def between(values: np.ndarray) -> np.ndarray:
    """Where a number begins to be nearer to the next of the sorted `values`."""
    return ((values[1:].astype(np.float64) + values[:-1]) / 2).astype(np.float32)


@partial(jax.jit, static_argnums=(0, 2))
def encode(format: Format, matrix: Array, contracted: int) -> dict[str, Array]:
    """The parts of a matrix [out..., in...] of any float dtype, of whose axes the last `contracted` are `in`."""
    wide = matrix.astype(jnp.float32)
    if format.kind == "int8":
        ins = tuple(range(matrix.ndim - contracted, matrix.ndim))
        scale = (jnp.max(jnp.abs(wide), axis=ins) / 127).astype(format.scale)
        return {"codes": jnp.round(wide / _divisor(jnp.expand_dims(scale, ins))).astype(jnp.int8), "scale": scale}
    blocks = wide.reshape(-1, format.block)
    scale = (jnp.max(jnp.abs(blocks), axis=1) / (7.5 if format.kind == "int4" else 1)).astype(format.scale)
    part = blocks / _divisor(scale)[:, None]
    if format.kind == "int4":
        codes = (jnp.clip(jnp.round(part), -8, 7) + 8).astype(jnp.uint8)
    else:
        codes = sum((part > edge).astype(jnp.uint8) for edge in between(NF4))
    codes = codes.reshape(-1, 2)  # type: ignore[union-attr]
    axes, X = matrix.shape[:-1], matrix.shape[-1]
    parts = {"codes": (codes[:, 0] << 4 | codes[:, 1]).reshape(*axes, X // 2)}
    parts |= nest(scale) if format.double else {"scale": scale}
    return parts | ({"scale": parts["scale"].reshape(*axes, -1)} if X % format.block == 0 else {})


def _divisor(scale: Array) -> Array:
    return jnp.maximum(scale.astype(jnp.float32), 1e-30)


@jax.jit
def nest(scale: Array) -> dict[str, Array]:
    """Scales float32[n] as the parts `scale` and `nested`."""
    mean = jnp.mean(scale)
    away = jnp.pad(scale - mean, (0, -len(scale) % NEST)).reshape(-1, NEST)
    largest = jnp.max(jnp.abs(away), axis=1)
    codes = jnp.searchsorted(between(dynamic()), (away / _divisor(largest)[:, None]).reshape(-1)[: len(scale)])
    return {"scale": codes.astype(jnp.uint8), "nested": jnp.concatenate([mean[None], largest])}


def scales(parts: Mapping[str, Array]) -> Array:
    """The scales of a matrix's parts in float32, in the shape of `scale`."""
    scale, nested = parts["scale"], parts.get("nested")
    if nested is None:
        return scale.astype(jnp.float32)
    lead = nested.shape[:-1]
    flat = scale.reshape(*lead, -1)
    away = jnp.asarray(dynamic())[flat] * jnp.repeat(nested[..., 1:], NEST, axis=-1)[..., : flat.shape[-1]]
    away = jnp.minimum(away, 3e38)  # which it is: but without a step between, XLA on a CPU multiplies and adds in one rounding
    return (away + nested[..., :1]).reshape(scale.shape)


def decode(format: Format, parts: Mapping[str, Array], shape: tuple[int, ...]) -> Array:
    """float32 [*lead, *shape] of what `encode` made of a matrix of this shape."""
    codes, scale = parts["codes"], scales(parts)
    if format.kind == "int8":
        return codes * scale.reshape(*scale.shape, *[1] * (codes.ndim - scale.ndim))
    lead = codes.shape[: codes.ndim - len(shape)]
    values = _values(format, jnp.stack([codes >> 4, codes & 15], axis=-1)).reshape(*lead, -1, format.block)
    return (values * scale.reshape(*lead, -1, 1)).reshape(*lead, *shape)


def _values(format: Format, codes: Array) -> Array:
    """What codes 0..15 say, in units of their scale. nf4 by 15 selections, not by a table: a CPU makes vectors of them, others one fused product."""
    if format.kind == "int4":
        return codes.astype(jnp.int8).astype(jnp.float32) - 8
    values: list = list(NF4)
    for bit in range(4):
        odd = (codes >> bit & 1).astype(bool)
        values = [jnp.where(odd, high, low) for low, high in zip(values[::2], values[1::2])]
    return values[0]


def multiply(format: Format, x: Array, codes: Array, scale: Array) -> Array:
    """x [..., I] times a matrix of codes and float32 scales, [O, I] or [O, I/2] and [O] or [O, I/block] -> float32 [..., O].

    In x's dtype, summed in float32. Where devices compute it (`jax.lax.platform_dependent`):
    a CPU makes wide as many rows as stay in its cache and multiplies by them before the next (the whole matrix: 11 times slower);
    others do all at once, a single x as one fused sum, which reads a 4-bit matrix once.
    """
    return jax.lax.platform_dependent(x, codes, scale, cpu=partial(_in_strips, format), default=partial(_at_once, format))


def _at_once(format: Format, x: Array, codes: Array, scale: Array) -> Array:
    single = math.prod(x.shape[:-1]) == 1
    return _rows(format, _summed if single else _product, x, codes, scale)


def _in_strips(format: Format, x: Array, codes: Array, scale: Array) -> Array:
    O, single = len(codes), math.prod(x.shape[:-1]) == 1
    size = ROWS if single and format.kind != "int8" else max(1, STRIP // (4 * x.shape[-1]))
    one = jax.checkpoint(partial(_rows, format, _product, x))  # else a gradient keeps the wide rows
    if size >= O:
        return one(codes, scale)
    cut = partial(jax.lax.dynamic_slice_in_dim, slice_size=size)
    strips = jax.lax.map(lambda i: one(cut(codes, i * size), cut(scale, i * size)), jnp.arange(O // size))
    y = jnp.moveaxis(strips, 0, -2).reshape(*x.shape[:-1], -1)
    rest = O // size * size
    return y if rest == O else jnp.concatenate([y, one(codes[rest:], scale[rest:])], axis=-1)


def _rows(format: Format, product: Callable, x: Array, codes: Array, scale: Array) -> Array:
    """By 4-bit codes as two products, of every second number: to interleave the two nibbles would cost more than both."""
    if format.kind == "int8":
        return product(x, codes.astype(x.dtype)) * scale
    wide = lambda codes: (_values(format, codes).reshape(*scale.shape, -1) * scale[..., None]).reshape(codes.shape).astype(x.dtype)
    return product(x[..., ::2], wide(codes >> 4)) + product(x[..., 1::2], wide(codes & 15))


def _product(x: Array, matrix: Array) -> Array:
    return jnp.einsum("...i,oi->...o", x, matrix, preferred_element_type=jnp.float32)


def _summed(x: Array, matrix: Array) -> Array:
    return jnp.sum(matrix.astype(jnp.float32) * x.reshape(-1).astype(jnp.float32), axis=-1).reshape(*x.shape[:-1], -1)
