"""Products with matrices of 4- and 8-bit codes on TPUs, which move the bytes of the codes only.

The plain form is `model/codes.py`.
"""

from __future__ import annotations

from functools import partial

import jax
from jax import Array
from jax.typing import DTypeLike

from paligemma_jax.kernels.code_reader import CodeReader
from paligemma_jax.kernels.few_rows import are_few, multiply_few_rows
from paligemma_jax.kernels.many_rows import multiply_many_rows


@partial(jax.custom_vjp, nondiff_argnums=(0, 4))
def coded_product(
    reader: CodeReader, x: Array, codes: Array, scale: Array, dtype: DTypeLike
) -> Array:
    """x [M, I] times a matrix of codes -> [M, O] in `dtype`, rounded once. Operands have x's dtype,
    sums are float32. Only x has a gradient.

    Args:
        x: bfloat16, or float32, which is multiplied at the highest precision.
        codes: uint8[O, I/2], two codes a byte, the first in the high bits; or int8[O, I].
        scale: float32[O, I/block]; for int8 float32[O].
    """
    if are_few(reader, x):
        return multiply_few_rows(reader, x, codes, scale, dtype)
    return multiply_many_rows(reader, x, codes, scale, dtype, x.shape[1])


def _forward(reader: CodeReader, x: Array, codes: Array, scale: Array, dtype: DTypeLike):
    return coded_product(reader, x, codes, scale, dtype), (x, codes, scale)


def _backward(reader: CodeReader, _: DTypeLike, saved: tuple[Array, Array, Array], y_bar: Array):
    x, codes, scale = saved
    y_bar = (y_bar if reader.table else y_bar * scale).astype(x.dtype)
    I = x.shape[1]
    return multiply_many_rows(reader, y_bar, codes, scale, x.dtype, I, True), None, None


coded_product.defvjp(_forward, _backward)
