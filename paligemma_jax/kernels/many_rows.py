"""Many rows times codes: the matrix unit is the bottleneck.

Weights are widened, with their scales, once for all rows in vector memory: the next 256 columns
while the matrix unit multiplies by the last.
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

from paligemma_jax.kernels.code_reader import COLUMNS, LANES, SUBLANES, CodeReader, gather, log2
from paligemma_jax.kernels.tiles import cost, dot, output_block, pad_to, round_up

STRIP = 512  # at most, rows of x per product
OPERAND_BYTES = 10 * 2**20  # at most, of x, or of results and their sums, in vector memory
MARGIN = 3 * 2**20  # of vector memory, for spilled registers and the next weights


@partial(jax.jit, static_argnums=(0, 4, 5, 6))  # layers of the same shape are traced once
def multiply_many_rows(
    reader: CodeReader,
    x: Array,
    codes: Array,
    scale: Array,
    dtype: DTypeLike,
    I: int,
    transposed: bool = False,
) -> Array:
    """x [M, I] times the matrix -> [M, O], or x [M, O] times its transpose -> [M, I]."""
    M, O, columns, outputs = len(x), len(codes), round_up(I, COLUMNS), output_block(len(codes))
    rows, strip = _row_blocks(M, columns * (x.dtype.itemsize + 4 * transposed))
    O_read = round_up(O, outputs) if transposed else O
    blocks = columns // reader.block if reader.table else 1
    lanes = round_up(blocks, LANES)
    x = pad_to(x, M, O_read if transposed else columns)
    scale = pad_to(scale.T if reader.table else scale[None], blocks, O_read)
    # XLA keeps arrays of the program, such as x, in what a kernel leaves of the vector memory.
    wide, narrow = rows * columns * x.dtype.itemsize, rows * outputs * 2 * x.dtype.itemsize
    sums = 4 * rows * (columns if transposed else outputs)
    memory = wide + narrow + sums + 2 * outputs * (columns + 8 * lanes) + MARGIN
    by_columns = pl.BlockSpec((rows, columns), lambda m, o: (m, 0), pipeline_mode=pl.Buffered(1))
    by_outputs = pl.BlockSpec((rows, outputs), lambda m, o: (m, o))
    return pl.pallas_call(
        partial(_kernel, reader, transposed, strip),
        out_shape=jax.ShapeDtypeStruct((M, I if transposed else O), dtype),
        grid=(pl.cdiv(M, rows), pl.cdiv(O, outputs)),
        in_specs=[
            by_outputs if transposed else by_columns,
            pl.BlockSpec((outputs, reader.width(columns)), lambda m, o: (o, 0)),
            pl.BlockSpec((lanes, outputs), lambda m, o: (0, o)),
        ],
        out_specs=by_columns if transposed else by_outputs,
        scratch_shapes=[
            pltpu.VMEM((rows, columns if transposed else outputs), jnp.float32),
            pltpu.VMEM((outputs, lanes), jnp.float32),
            pltpu.VMEM((2, outputs, COLUMNS), x.dtype),
        ],
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=memory),
        cost_estimate=cost(x, codes, scale, M * (I if transposed else O), dtype),
        name="coded_product_transposed" if transposed else "coded_product",
    )(x, codes, scale)


def _kernel(
    reader: CodeReader,
    transposed: bool,
    strip: int,
    x: jax.Ref,
    codes: jax.Ref,
    scale: jax.Ref,
    y: jax.Ref,
    sums: jax.Ref,
    row_scales: jax.Ref,
    weights: jax.Ref,
) -> None:
    o, steps = pl.program_id(1), (y if transposed else x).shape[1] // COLUMNS
    last = (pl.num_programs(1) if transposed else steps) - 1  # after which sums are complete
    strips, tiles = len(x) // strip, len(codes) // LANES
    row_scales[...] = scale[...].T

    def widen(c: Array, n: Array) -> None:
        tile = pl.ds(pl.multiple_of(n * LANES, LANES), LANES)
        for half, values in enumerate(reader.tile(codes, tile, c, jnp.float32)):
            if reader.table:
                values *= _scale_columns(row_scales, tile, reader.block, 2 * c + half)
            weights[c & 1, tile, half * LANES : (half + 1) * LANES] = values.astype(x.dtype)

    def step(c: Array, _: None) -> None:
        columns, turn = pl.ds(pl.multiple_of(c * COLUMNS, COLUMNS), COLUMNS), o if transposed else c

        def multiply(s: Array, _: None) -> None:
            at = pl.ds(pl.multiple_of(s * strip, strip), strip)
            place = (at, columns if transposed else slice(None))
            operand = x[at, :] if transposed else x[at, columns]
            total = dot(operand, weights[c & 1], 1, 0 if transposed else 1, Precision.HIGHEST)
            for i in range(pl.cdiv(tiles, strips)):
                n = s * pl.cdiv(tiles, strips) + i
                widen(jnp.minimum(c + 1, steps - 1), jnp.minimum(n, tiles - 1))
            sums[place] = total = total + jnp.where(turn == 0, 0, sums[place])

            @pl.when(turn == last)
            def _() -> None:
                scaled = transposed or reader.table
                y[place] = (total if scaled else total * scale[:1, :]).astype(y.dtype)

        jax.lax.fori_loop(0, strips, multiply, None)

    jax.lax.fori_loop(0, tiles, lambda n, _: widen(jnp.int32(0), n), None)
    jax.lax.fori_loop(0, steps, step, None)


def _scale_columns(row_scales: jax.Ref, rows: slice | pl.Slice, block: int, half: Array) -> Array:
    """float32[R, 128]: the scale of each weight in 128 columns, from [O, blocks]."""
    first = half * (LANES // block)
    group = row_scales[rows, pl.ds(pl.multiple_of(first & -LANES, LANES), LANES)]
    lane = jax.lax.broadcasted_iota(jnp.int32, group.shape, 1)
    return gather(group, (first & (LANES - 1)) + (lane >> log2(block)), axis=1)


def _row_blocks(M: int, row_bytes: int) -> tuple[int, int]:
    """Rows of x per program, and per product."""
    programs = pl.cdiv(M * row_bytes, OPERAND_BYTES)
    strips = pl.cdiv(pl.cdiv(M, programs), STRIP)
    strip = round_up(pl.cdiv(M, programs * strips), 2 * SUBLANES)  # registers of bfloat16
    return strips * strip, strip
