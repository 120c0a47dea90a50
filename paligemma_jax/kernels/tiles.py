"""Sizes of what kernels of coded products read at a time, and the product of two tiles."""

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


def dot(x: Array, y: Array, axis: int) -> Array:
    """float32: x contracted along its last axis with this axis of y, at the highest precision."""
    exact = x.dtype == jnp.float32  # bfloat16 needs one pass, whatever the default precision
    return jax.lax.dot_general(
        x,
        y,
        (((1,), (axis,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )


def cost(x: Array, codes: Array, scale: Array, results: int, dtype: DTypeLike) -> pl.CostEstimate:
    """The work of a product for XLA's scheduler."""
    read = sum(array.size * array.dtype.itemsize for array in (x, codes, scale))
    written = results * jnp.dtype(dtype).itemsize
    return pl.CostEstimate(
        flops=2 * results * x.shape[1], bytes_accessed=read + written, transcendentals=0
    )
