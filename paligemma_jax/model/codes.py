"""Matrices as codes and scales: their parts, their values, and products with them.

    int8   code * scale, one scale per output, |code| <= 127 (the weights of LLM.int8,
           arXiv:2208.07339, in bitsandbytes)
    w8a8   the same codes and scales; products also round x (`quantization/w8a8.py`)
    int4   code * scale, one scale per block of numbers in memory order, -8 <= code <= 7,
           scale = largest / 7.5 (as in qwix)
    nf4    the same blocks, divided by their largest magnitude and rounded to the nearest of 16
           values (QLoRA, arXiv:2305.14314; bitsandbytes)
    fp4    the same with 16 other values: 4-bit floats (bitsandbytes)

Two 4-bit codes share a byte, the first in the high bits. The parts of a matrix [out..., in...]
whose last axis has size X, by name:

    codes    int8 [out..., in...], or uint8 [..., X/2]
    scale    float32 or bfloat16 [out...], or [..., X/block], but flat [blocks] where the block does
             not divide X; uint8 if scales are quantized too
    nested   only then, float32 [1 + blocks/256]: the mean of the scales, and their largest distance
             from it in every 256 of them (QLoRA)

Codes and scales keep the matrix's axes, so they are sharded as the matrix would be. The leading
axes of a stack come first in each part.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from paligemma_jax.kernels.code_reader import CodeReader
from paligemma_jax.kernels.coded_product import coded_product
from paligemma_jax.model.precision import WeightFormat

NESTED_BLOCK = 256  # scales per scale of scales
STRIP_BYTES = 2**22  # of rows widened at a time on a CPU, to stay in its cache until multiplied
# Rows of 4-bit codes in a strip for a single x, for which small strips are faster: nf4 2.9 ms
# instead of 3.7, int4 1.6 instead of 2.1 (docs/quantization.md).
STRIP_ROWS = 128

# Quantiles of N(0, 1), scaled to [-1, 1], with an exact 0 (bitsandbytes `get_4bit_type`).
NF4 = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    np.float32,
)

# Floats of 1 sign bit, 2 of exponent and 1 of mantissa, divided by the largest (bitsandbytes
# `get_4bit_type`). By code, which is not in ascending order: the sign is the high bit.
FP4 = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3], np.float32) / 12
TABLES = {"nf4": NF4, "fp4": FP4}


@cache
def dynamic_map() -> np.ndarray:
    """float32[256]: the values of quantized scales' codes, bit-identical to bitsandbytes'
    `create_dynamic_map` (arXiv:1511.04561).

    Seven decades of both signs, each twice as fine as the one below. Computed in float64, because
    torch's `linspace` multiplies and adds with one rounding.
    """
    values = [np.array([0, 1], np.float32)]
    for decade in range(7):
        n = 2**decade
        low, step = float(np.float32(0.1)), float((np.float32(1) - np.float32(0.1)) / np.float32(n))
        k = np.arange(n + 1)
        edges = np.where(k < (n + 1) // 2, low + step * k, 1 - step * (n - k)).astype(np.float32)
        middle = (edges[:-1] + edges[1:]) / 2 * np.float32(10.0 ** (decade - 6))
        values += [middle, -middle]
    return np.sort(np.concatenate(values))


def midpoints(values: np.ndarray) -> np.ndarray:
    """float32[n-1]: halfway between neighbors of sorted float32[n] `values`."""
    return ((values[1:].astype(np.float64) + values[:-1]) / 2).astype(np.float32)


@partial(jax.jit, static_argnums=(0, 2))
def encode(format: WeightFormat, matrix: Array, contracted: int) -> dict[str, Array]:
    """The parts of a float matrix [out..., in...] whose last `contracted` axes are inputs."""
    values = matrix.astype(jnp.float32)
    if not format.has_blocks:
        ins = tuple(range(matrix.ndim - contracted, matrix.ndim))
        scale = (jnp.max(jnp.abs(values), axis=ins) / 127).astype(format.scale)
        codes = jnp.round(values / _divisor(jnp.expand_dims(scale, ins)))
        return {"codes": codes.astype(jnp.int8), "scale": scale}
    blocks = values.reshape(-1, format.block)
    largest = jnp.max(jnp.abs(blocks), axis=1)
    scale = (largest / (7.5 if format.kind == "int4" else 1)).astype(format.scale)
    codes = nearest_codes(format, blocks / _divisor(scale)[:, None])
    return pack(format, codes.reshape(matrix.shape), scale)


def nearest_codes(format: WeightFormat, numbers: Array) -> Array:
    """The codes 0..15 of the 4-bit values nearest to numbers in units of their scale, in uint8."""
    if format.kind == "int4":
        return (jnp.clip(jnp.round(numbers), -8, 7) + 8).astype(jnp.uint8)
    table = TABLES[format.kind]
    order = np.argsort(table, stable=True)
    codes = jnp.zeros(numbers.shape, jnp.uint8)
    for edge in midpoints(table[order]):
        codes += (numbers > edge).astype(jnp.uint8)
    return jnp.asarray(order, jnp.uint8)[codes] if format.kind == "fp4" else codes


def pack(format: WeightFormat, codes: Array, scale: Array) -> dict[str, Array]:
    """The parts of a matrix with these codes uint8[out..., in...] and scales [blocks]."""
    *axes, X = codes.shape
    parts = {"codes": codes[..., ::2] << 4 | codes[..., 1::2]}
    parts |= quantize_scales(scale) if format.double else {"scale": scale}
    if X % format.block == 0:
        parts["scale"] = parts["scale"].reshape(*axes, -1)
    return parts


def _divisor(scale: Array) -> Array:
    return jnp.maximum(scale.astype(jnp.float32), 1e-30)


@jax.jit
def quantize_scales(scale: Array) -> dict[str, Array]:
    """float32[n] scales as the parts `scale` and `nested`."""
    mean = jnp.mean(scale)
    offset = jnp.pad(scale - mean, (0, -len(scale) % NESTED_BLOCK)).reshape(-1, NESTED_BLOCK)
    largest = jnp.max(jnp.abs(offset), axis=1)
    normalized = (offset / _divisor(largest)[:, None]).reshape(-1)[: len(scale)]
    codes = jnp.searchsorted(midpoints(dynamic_map()), normalized)
    return {"scale": codes.astype(jnp.uint8), "nested": jnp.concatenate([mean[None], largest])}


def scales(parts: Mapping[str, Array]) -> Array:
    """The scales of a matrix's parts in float32, in the shape of `scale`."""
    scale, nested = parts["scale"], parts.get("nested")
    if nested is None:
        return scale.astype(jnp.float32)
    flat = scale.reshape(*nested.shape[:-1], -1)
    largest = jnp.repeat(nested[..., 1:], NESTED_BLOCK, axis=-1)[..., : flat.shape[-1]]
    offset = jnp.asarray(dynamic_map())[flat] * largest
    # Always true; without a step in between XLA on a CPU multiplies and adds with one rounding.
    offset = jnp.minimum(offset, 3e38)
    return (offset + nested[..., :1]).reshape(scale.shape)


def decode(format: WeightFormat, parts: Mapping[str, Array], shape: tuple[int, ...]) -> Array:
    """float32[*lead, *shape]: the inverse of `encode` for a matrix of this shape."""
    codes, scale = parts["codes"], scales(parts)
    if not format.has_blocks:
        return codes * scale.reshape(*scale.shape, *[1] * (codes.ndim - scale.ndim))
    lead = codes.shape[: codes.ndim - len(shape)]
    values = code_values(format, jnp.stack([codes >> 4, codes & 15], axis=-1))
    values = values.reshape(*lead, -1, format.block) * scale.reshape(*lead, -1, 1)
    return values.reshape(*lead, *shape)


def code_values(format: WeightFormat, codes: Array) -> Array:
    """Values of the codes 0..15 in units of their scale. A table becomes 15 selects, which a CPU
    vectorizes, and other compilers fuse them into the product."""
    if format.kind == "int4":
        return codes.astype(jnp.int8).astype(jnp.float32) - 8
    values: list = list(TABLES[format.kind])
    for bit in range(4):
        odd = (codes >> bit & 1).astype(bool)
        pairs = zip(values[::2], values[1::2], strict=True)
        values = [jnp.where(odd, high, low) for low, high in pairs]
    return values[0]


def multiply(
    format: WeightFormat, x: Array, codes: Array, scale: Array, dtype: DTypeLike = jnp.float32
) -> Array:
    """x [..., I] times a matrix of codes [O, I] or [O, I/2] and float32 scales [O] or [O, I/block]
    -> [..., O] in `dtype`, with operands in x's dtype and sums in float32, rounded once.

    The platform chooses (`jax.lax.platform_dependent`): a CPU widens as many rows as stay in its
    cache and multiplies by them before the next (the whole matrix at once: 11 times slower). A TPU
    widens codes on the chip (`kernels/coded_product.py`). Others, and the devices of a mesh, widen
    all at once, and multiply a single x as one fused sum, which reads a 4-bit matrix once.
    """

    def rounded(product: Callable[..., Array], *parts: Array) -> Array:
        return product(format, *parts).astype(dtype)

    plain = partial(rounded, _at_once)
    kernel = partial(_on_chip, format, dtype) if _has_kernel(x) else plain
    return jax.lax.platform_dependent(
        x, codes, scale, cpu=partial(rounded, _in_strips), tpu=kernel, default=plain
    )


def _has_kernel(x: Array) -> bool:
    """Whether the kernel can compute a product: GSPMD does not split it over a mesh."""
    return jax.sharding.get_abstract_mesh().size <= 1 and x.dtype in (jnp.bfloat16, jnp.float32)


def _on_chip(format: WeightFormat, dtype: DTypeLike, x: Array, codes: Array, scale: Array) -> Array:
    rows = x.reshape(-1, x.shape[-1])
    y: Array = coded_product(_reader(format), rows, codes, scale, dtype)  # type: ignore[assignment]
    return y.reshape(*x.shape[:-1], -1)


def _reader(format: WeightFormat) -> CodeReader:
    if format.kind == "int8":
        return CodeReader()
    table = TABLES.get(format.kind, np.arange(-8, 8))
    return CodeReader(tuple(map(float, table)), format.block)


def _at_once(format: WeightFormat, x: Array, codes: Array, scale: Array) -> Array:
    single = math.prod(x.shape[:-1]) == 1
    return _multiply_rows(format, _sum_products if single else _product, x, codes, scale)


def _in_strips(format: WeightFormat, x: Array, codes: Array, scale: Array) -> Array:
    O, single = len(codes), math.prod(x.shape[:-1]) == 1
    small = single and format.has_blocks
    size = STRIP_ROWS if small else max(1, STRIP_BYTES // (4 * x.shape[-1]))
    # Checkpointed: otherwise a gradient keeps the widened rows.
    strip = jax.checkpoint(partial(_multiply_rows, format, _product, x))
    if size >= O:
        return strip(codes, scale)
    cut = partial(jax.lax.dynamic_slice_in_dim, slice_size=size)
    starts = size * jnp.arange(O // size)
    strips = jax.lax.map(lambda start: strip(cut(codes, start), cut(scale, start)), starts)
    y = jnp.moveaxis(strips, 0, -2).reshape(*x.shape[:-1], -1)
    rest = O // size * size
    return y if rest == O else jnp.concatenate([y, strip(codes[rest:], scale[rest:])], axis=-1)


def _multiply_rows(
    format: WeightFormat, product: Callable, x: Array, codes: Array, scale: Array
) -> Array:
    """4-bit codes as two products, of even and of odd columns: interleaving the nibbles would take
    longer than both."""
    if not format.has_blocks:
        return product(x, codes.astype(x.dtype)) * scale

    def widen(nibbles: Array) -> Array:
        values = code_values(format, nibbles).reshape(*scale.shape, -1) * scale[..., None]
        return values.reshape(nibbles.shape).astype(x.dtype)

    return product(x[..., ::2], widen(codes >> 4)) + product(x[..., 1::2], widen(codes & 15))


def _product(x: Array, matrix: Array) -> Array:
    return jnp.einsum("...i,oi->...o", x, matrix, preferred_element_type=jnp.float32)


def _sum_products(x: Array, matrix: Array) -> Array:
    products = matrix.astype(jnp.float32) * x.reshape(-1).astype(jnp.float32)
    return jnp.sum(products, axis=-1).reshape(*x.shape[:-1], -1)
