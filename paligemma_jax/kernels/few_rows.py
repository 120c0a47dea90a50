"""A few rows of bfloat16 times 4-bit codes: the vector unit is the bottleneck.

So it does little per weight: scales are applied to the sums of each block. The matrix unit computes
these at no extra cost if every row of x is repeated for each block in 128 columns, with zeros
outside of the block.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.lax import Precision
from jax.typing import DTypeLike

from paligemma_jax.kernels.code_reader import COLUMNS, LANES, SUBLANES, CodeReader, log2
from paligemma_jax.kernels.tiles import VECTOR_MEMORY, cost, dot, output_block, pad_to, round_up

REPEATED_ROWS = 64  # at most: then the matrix unit is as fast as the vector unit


def are_few(reader: CodeReader, x: Array) -> bool:
    """Whether this form computes the product, and is the faster one."""
    if x.dtype != jnp.bfloat16 or not reader.packs_bfloat16:
        return False
    return round_up(len(x), SUBLANES) * LANES // reader.block <= REPEATED_ROWS


@partial(jax.jit, static_argnums=(0, 4))  # layers of the same shape are traced once
def multiply_few_rows(
    reader: CodeReader, x: Array, codes: Array, scale: Array, dtype: DTypeLike
) -> Array:
    """`coded_product` for x that `are_few`."""
    (M, I), O = x.shape, len(codes)
    rows, columns, outputs = round_up(M, SUBLANES), round_up(I, COLUMNS), output_block(O)
    x, scale = pad_to(x, M, columns), pad_to(scale.T, columns // reader.block, O)
    return pl.pallas_call(
        partial(_kernel, reader),
        out_shape=jax.ShapeDtypeStruct((M, O), dtype),
        grid=(pl.cdiv(O, outputs),),
        in_specs=[
            pl.BlockSpec((rows, columns), lambda o: (0, 0)),
            pl.BlockSpec((outputs, reader.width(columns)), lambda o: (o, 0)),
            pl.BlockSpec((len(scale), outputs), lambda o: (0, o)),
        ],
        out_specs=pl.BlockSpec((rows, outputs), lambda o: (0, o)),
        scratch_shapes=[pltpu.VMEM((rows, outputs), jnp.float32)],
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=VECTOR_MEMORY),
        cost_estimate=cost(x, codes, scale, M * O, dtype),
        name="coded_product",
    )(x, codes, scale)


def _kernel(
    reader: CodeReader, x: jax.Ref, codes: jax.Ref, scale: jax.Ref, y: jax.Ref, sums: jax.Ref
) -> None:
    rows, outputs = sums.shape
    repeats = LANES // reader.block
    sums[...] = jnp.zeros(sums.shape, sums.dtype)

    def step(c: Array, _: None) -> None:
        first = 2 * repeats * c
        scales = [scale[pl.ds(first + b, 1), :] for b in range(2 * repeats)]
        halves = [
            _repeated(reader, x[:, pl.ds(pl.multiple_of(c * COLUMNS + i, LANES), LANES)])
            for i in (0, LANES)
        ]
        for n in range(outputs // LANES):
            tile = slice(n * LANES, (n + 1) * LANES)
            total = sums[:, tile]
            for half, weights in enumerate(reader.tile(codes, tile, c, jnp.bfloat16)):
                product = dot(halves[half], weights, 1, 1, Precision.HIGHEST)
                blocks = jax.lax.split(product, [rows] * repeats)
                for b, block in enumerate(blocks):
                    total += block * scales[half * repeats + b][:, tile]
            sums[:, tile] = total

    steps = x.shape[1] // COLUMNS
    unroll = next(n for n in (3, 2, 1) if steps % n == 0)
    jax.lax.fori_loop(0, steps, step, None, unroll=unroll)
    y[...] = sums[...].astype(y.dtype)


def _repeated(reader: CodeReader, x: Array) -> Array:
    """[repeats * M, 128] from [M, 128]: a copy for each block, zero outside of it."""
    block = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1) >> log2(reader.block)
    wide = x.astype(jnp.float32)  # v5e selects 32 bits only
    copies = [jnp.where(block == b, wide, 0) for b in range(LANES // reader.block)]
    return jnp.concatenate(copies).astype(x.dtype)
