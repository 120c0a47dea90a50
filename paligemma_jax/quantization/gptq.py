"""GPTQ (arXiv:2210.17323): 4-bit codes that preserve the outputs of a layer, not its weights.

Columns of a matrix are rounded one after another, and the error of each is made up for by those
that are not rounded yet. How well they can do so depends on the second moments of the layer's
inputs.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from paligemma_jax.model.codes import TABLES, nearest_codes, pack, scales
from paligemma_jax.model.precision import WeightFormat

DAMPING = 0.01  # added to the diagonal of the moments, times its mean (as in the paper)
# Scales to try, as fractions of the one that maps a block's largest magnitude to the last code.
FRACTIONS = np.linspace(0.6, 1.1, 26)
COLUMNS = 128  # updated together; the others only once they are rounded (as in the paper)

highest = partial(jnp.matmul, precision="highest")


@partial(jax.jit, static_argnums=0)
def encode_calibrated(format: WeightFormat, matrix: Array, moments: Array) -> dict[str, Array]:
    """The parts of a float matrix [out..., in...] in a 4-bit format, as `encode` returns them.

    Columns with large moments are rounded first, and scales are chosen before that.

    Args:
        moments: float32[I, I], the sum of x x^T over inputs x of the matrix.
    """
    I = len(moments)
    scale = choose_scales(format, matrix.astype(jnp.float32).reshape(-1, format.block))
    stored = scales(pack(format, jnp.zeros(matrix.shape, jnp.uint8), scale))
    steps = jnp.repeat(stored.reshape(-1), format.block).reshape(-1, I)
    order = jnp.argsort(-jnp.diag(moments))
    weights = matrix.astype(jnp.float32).reshape(-1, I)
    factor = inverse_factor(moments[order][:, order])
    codes = _round_columns(format, weights[:, order], steps[:, order], factor)
    return pack(format, codes[:, jnp.argsort(order)].reshape(matrix.shape), scale)


def choose_scales(format: WeightFormat, blocks: Array) -> Array:
    """The scales of blocks [n, block], of those tried, whose rounding error is smallest.

    Negative ones too, since codes are not symmetric, unless they are to be quantized.
    """
    largest = jnp.max(jnp.abs(blocks), axis=1) / (7.5 if format.kind == "int4" else 1)
    tried = FRACTIONS if format.double else np.concatenate([FRACTIONS, -FRACTIONS])

    def compare(best: tuple[Array, Array], fraction: Array) -> tuple[tuple[Array, Array], None]:
        scale = (fraction * largest).astype(format.scale)
        _, rounded = _round(format, blocks, scale.astype(jnp.float32)[:, None])
        error = jnp.sum((rounded - blocks) ** 2, axis=1)
        better = error < best[1]
        return (jnp.where(better, scale, best[0]), jnp.where(better, error, best[1])), None

    start = jnp.zeros(len(blocks), format.scale), jnp.full(len(blocks), jnp.inf)
    return jax.lax.scan(compare, start, jnp.asarray(tried, jnp.float32))[0][0]


def inverse_factor(moments: Array) -> Array:
    """The upper triangular U with (moments + damping)^-1 = U^T U.

    One Cholesky factorization with rows and columns reversed, and the inverse of its factor.
    """
    I = len(moments)
    damped = moments + DAMPING * jnp.mean(jnp.diag(moments)) * jnp.eye(I)
    reverse = jnp.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1]
    return jax.scipy.linalg.solve_triangular(reverse, jnp.eye(I))


def _round_columns(format: WeightFormat, weights: Array, steps: Array, factor: Array) -> Array:
    """The codes uint8[O, I] of weights [O, I] with these scales, column by column."""
    O, I = weights.shape
    size = next(n for n in range(min(COLUMNS, I), 0, -1) if I % n == 0)

    def round_group(rest: Array, start: Array) -> tuple[Array, Array]:
        rows = jax.lax.dynamic_slice(factor, (start, 0), (size, I))
        group, scale = (
            jax.lax.dynamic_slice(array, (0, start), (O, size)) for array in (rest, steps)
        )
        square = jax.lax.dynamic_slice(rows, (0, start), (size, size))

        def round_column(group: Array, i: Array) -> tuple[Array, tuple[Array, Array]]:
            codes, rounded = _round(format, group[:, i], scale[:, i])
            error = (group[:, i] - rounded) / square[i, i]
            return group - error[:, None] * square[i], (codes, error)

        _, (codes, errors) = jax.lax.scan(round_column, group, jnp.arange(size))
        return rest - highest(errors.T, rows), codes  # rows are 0 before `start`

    _, codes = jax.lax.scan(round_group, weights, jnp.arange(0, I, size))
    return codes.reshape(I, O).T


def _round(format: WeightFormat, numbers: Array, scale: Array) -> tuple[Array, Array]:
    """Codes, and the values that they stand for."""
    codes = nearest_codes(format, numbers / jnp.where(scale == 0, 1, scale))
    values = TABLES.get(format.kind, np.arange(-8, 8, dtype=np.float32))
    return codes, jnp.asarray(values)[codes] * scale
