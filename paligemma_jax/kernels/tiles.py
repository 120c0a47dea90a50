"""Sizes of what kernels read at a time, and the product of two tiles."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.typing import DTypeLike

from paligemma_jax.kernels.code_reader import LANES

OUTPUTS = (512, 384, 256, 128)  # rows of a matrix per program: the first that divides them
VECTOR_MEMORY = 56 * 2**20  # of 64 MiB on v5p, 128 MiB on v5e and v6e


def round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def output_block(O: int) -> int:
    """Rows of a matrix of O rows that a program reads."""
    return next((n for n in OUTPUTS if O % n == 0), min(OUTPUTS[0], round_up(O, LANES)))


def pad_to(x: Array, rows: int, columns: int) -> Array:
    """x with zeros up to this shape."""
    return jnp.pad(x, ((0, rows - x.shape[0]), (0, columns - x.shape[1])))


def dot(
    a: Array, b: Array, a_axis: int, b_axis: int, precision: jax.lax.Precision | None = None
) -> Array:
    """float32: axes of two matrices contracted. float32 operands take `precision`, by default
    `jax_default_matmul_precision`; 16-bit operands need one pass, whatever these are."""
    return jax.lax.dot_general(
        a,
        b,
        (((a_axis,), (b_axis,)), ((), ())),
        precision=precision if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )


def cost(x: Array, codes: Array, scale: Array, results: int, dtype: DTypeLike) -> pl.CostEstimate:
    """The work of a product for XLA's scheduler."""
    read = sum(array.size * array.dtype.itemsize for array in (x, codes, scale))
    written = results * jnp.dtype(dtype).itemsize
    return pl.CostEstimate(
        flops=2 * results * x.shape[1], bytes_accessed=read + written, transcendentals=0
    )
