"""Products with matrices of 4- and 8-bit codes on TPUs, which move the bytes of the codes only.

The plain form is `model/codes.py`. Scales of 4-bit codes are applied where that costs least:

- For a few rows of x, to the sums of each block. The matrix unit computes these at no extra cost
  if every row of x is repeated for each block in 128 columns, with zeros outside of the block.
- For many rows, to the weights, which all rows share.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from paligemma_jax.kernels.code_reader import COLUMNS, LANES, SUBLANES, CodeReader, gather

OUTPUTS = (512, 384, 256, 128)  # rows of the matrix per program: the first that divides them
STRIP = 512  # at most, rows of x per product of many
SPREAD_ROWS = 64  # at most, of x repeated for the blocks in 128 columns
OPERAND_BYTES = 24 * 2**20  # at most, of x or of sums in vector memory
VECTOR_MEMORY = 56 * 2**20  # of 64 MiB on v5p, 128 MiB on v5e and v6e


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
    few = x.dtype == jnp.bfloat16 and reader.packs_bfloat16
    if few and _round_up(len(x), SUBLANES) * LANES // reader.block <= SPREAD_ROWS:
        return _few_rows(reader, x, codes, scale, dtype)
    return _many_rows(reader, x, codes, scale, dtype, x.shape[1])


def _forward(reader: CodeReader, x: Array, codes: Array, scale: Array, dtype: DTypeLike):
    return coded_product(reader, x, codes, scale, dtype), (x, codes, scale)


def _backward(reader: CodeReader, _: DTypeLike, saved: tuple[Array, Array, Array], y_bar: Array):
    x, codes, scale = saved
    y_bar = (y_bar if reader.table else y_bar * scale).astype(x.dtype)
    I = x.shape[1]
    return _many_rows(reader, y_bar, codes, scale, x.dtype, I, True), None, None


coded_product.defvjp(_forward, _backward)


# Compiled, so that layers of the same shape are traced once.
@partial(jax.jit, static_argnums=(0, 4))
def _few_rows(reader: CodeReader, x: Array, codes: Array, scale: Array, dtype: DTypeLike) -> Array:
    (M, I), O, spread = x.shape, len(codes), LANES // reader.block
    rows, columns, outputs = _round_up(M, SUBLANES), _round_up(I, COLUMNS), _outputs(O)
    x, scale = _pad(x, M, columns), _pad(scale.T, columns // reader.block, O)

    def kernel(x: jax.Ref, codes: jax.Ref, scale: jax.Ref, y: jax.Ref, sums: jax.Ref) -> None:
        lane = jax.lax.broadcasted_iota(jnp.int32, (rows, LANES), 1)
        block = lane >> _log2(reader.block)
        sums[...] = jnp.zeros(sums.shape, sums.dtype)

        def step(c: Array, _: None) -> None:
            x_blocks = []
            for half in range(2):
                at = pl.ds(pl.multiple_of(c * COLUMNS + half * LANES, LANES), LANES)
                x_half = x[:, at].astype(jnp.float32)  # v5e selects in 32 bits only
                repeated = [jnp.where(block == b, x_half, 0) for b in range(spread)]
                x_blocks.append(jnp.concatenate(repeated).astype(jnp.bfloat16))

            scales = [scale[pl.ds(2 * spread * c + b, 1), :] for b in range(2 * spread)]
            for n in range(outputs // LANES):
                tile = slice(n * LANES, (n + 1) * LANES)
                total = sums[:, tile]
                for half, weights in enumerate(reader.tile(codes, tile, c, jnp.bfloat16)):
                    products = _dot(x_blocks[half], weights, 1)
                    for b in range(spread):
                        block_scale = scales[half * spread + b][:, tile]
                        total += products[b * rows : (b + 1) * rows] * block_scale
                sums[:, tile] = total

        steps = columns // COLUMNS
        unroll = next(n for n in (3, 2, 1) if steps % n == 0)
        jax.lax.fori_loop(0, steps, step, None, unroll=unroll)
        y[...] = sums[...].astype(y.dtype)

    return pl.pallas_call(
        kernel,
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
        cost_estimate=_cost(x, codes, scale, M * O, dtype),
        name="coded_product",
    )(x, codes, scale)


@partial(jax.jit, static_argnums=(0, 4, 5, 6))
def _many_rows(
    reader: CodeReader,
    x: Array,
    codes: Array,
    scale: Array,
    dtype: DTypeLike,
    I: int,
    transposed: bool = False,
) -> Array:
    """x [M, I] times the matrix -> [M, O], or x [M, O] times its transpose -> [M, I]."""
    M, O, columns, outputs = len(x), len(codes), _round_up(I, COLUMNS), _outputs(len(codes))
    O_read = _round_up(O, outputs) if transposed else O
    rows, strip = _row_blocks(M, columns * (x.dtype.itemsize + 4 * transposed))  # with sums
    blocks = columns // reader.block if reader.table else 1
    x = _pad(x, M, O_read if transposed else columns)
    scale = _pad(scale.T if reader.table else scale[None], blocks, O_read)
    lanes = _round_up(blocks, LANES)

    def kernel(
        x: jax.Ref,
        codes: jax.Ref,
        scale: jax.Ref,
        y: jax.Ref,
        sums: jax.Ref,
        row_scales: jax.Ref,
        weights: jax.Ref,
    ) -> None:
        row_scales[...] = scale[...].T
        o, steps = pl.program_id(1), columns // COLUMNS
        last = (pl.num_programs(1) if transposed else steps) - 1  # after which sums are complete

        def step(c: Array, _: None) -> None:
            def widen(n: Array, _: None) -> None:
                tile = pl.ds(pl.multiple_of(n * LANES, LANES), LANES)
                for half, values in enumerate(reader.tile(codes, tile, c, jnp.float32)):
                    if reader.table:
                        values *= _scale_columns(row_scales, tile, reader.block, 2 * c + half)
                    weights[tile, half * LANES : (half + 1) * LANES] = values.astype(x.dtype)

            jax.lax.fori_loop(0, outputs // LANES, widen, None)
            at = pl.ds(pl.multiple_of(c * COLUMNS, COLUMNS), COLUMNS)
            summed = o if transposed else c

            def multiply(s: Array, _: None) -> None:
                strip_rows = pl.ds(pl.multiple_of(s * strip, strip), strip)
                place = (strip_rows, at if transposed else slice(None))
                operand = x[strip_rows, :] if transposed else x[strip_rows, at]
                total = _dot(operand, weights[...].astype(x.dtype), 0 if transposed else 1)
                total += jnp.where(summed == 0, 0, sums[place])
                sums[place] = total

                @pl.when(summed == last)
                def _() -> None:
                    unscaled = not (transposed or reader.table)
                    y[place] = (total * scale[:1, :] if unscaled else total).astype(y.dtype)

            jax.lax.fori_loop(0, rows // strip, multiply, None)

        jax.lax.fori_loop(0, steps, step, None)

    by_columns = pl.BlockSpec((rows, columns), lambda m, o: (m, 0), pipeline_mode=pl.Buffered(1))
    by_outputs = pl.BlockSpec((rows, outputs), lambda m, o: (m, o))
    result = by_columns if transposed else by_outputs
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((M, I if transposed else O), dtype),
        grid=(pl.cdiv(M, rows), pl.cdiv(O, outputs)),
        in_specs=[
            by_outputs if transposed else by_columns,
            pl.BlockSpec((outputs, reader.width(columns)), lambda m, o: (o, 0)),
            pl.BlockSpec((lanes, outputs), lambda m, o: (0, o)),
        ],
        out_specs=result,
        scratch_shapes=[
            pltpu.VMEM((rows, columns if transposed else outputs), jnp.float32),
            pltpu.VMEM((outputs, lanes), jnp.float32),
            pltpu.VMEM((outputs, COLUMNS), x.dtype),
        ],
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=VECTOR_MEMORY),
        cost_estimate=_cost(x, codes, scale, M * (I if transposed else O), dtype),
        name="coded_product_transposed" if transposed else "coded_product",
    )(x, codes, scale)


def _scale_columns(row_scales: jax.Ref, rows: slice | pl.Slice, block: int, half: Array) -> Array:
    """float32[R, 128]: the scale of each weight in 128 columns, from [O, blocks]."""
    first = half * (LANES // block)
    group = row_scales[rows, pl.ds(pl.multiple_of(first & -LANES, LANES), LANES)]
    lane = jax.lax.broadcasted_iota(jnp.int32, group.shape, 1)
    return gather(group, (first & (LANES - 1)) + (lane >> _log2(block)), axis=1)


def _dot(x: Array, y: Array, axis: int) -> Array:
    """float32: x contracted along its last axis with this axis of y."""
    return jax.lax.dot_general(
        x,
        y,
        (((1,), (axis,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _log2(size: int) -> int:
    return size.bit_length() - 1


def _pad(x: Array, rows: int, columns: int) -> Array:
    """x with zeros up to this shape."""
    return jnp.pad(x, ((0, rows - x.shape[0]), (0, columns - x.shape[1])))


def _outputs(O: int) -> int:
    return next((n for n in OUTPUTS if O % n == 0), min(OUTPUTS[0], _round_up(O, LANES)))


def _row_blocks(M: int, row_bytes: int) -> tuple[int, int]:
    """Rows of x per program, and per product."""
    packed_rows = 2 * SUBLANES  # of bfloat16 in a register
    programs = pl.cdiv(M * row_bytes, OPERAND_BYTES)
    strips = pl.cdiv(pl.cdiv(M, programs), STRIP)
    strip = _round_up(pl.cdiv(M, programs * strips), packed_rows)
    return strips * strip, strip


def _cost(x: Array, codes: Array, scale: Array, results: int, dtype: DTypeLike) -> pl.CostEstimate:
    contracted = x.shape[1]
    bytes_ = sum(a.size * a.dtype.itemsize for a in (x, codes, scale))
    bytes_ += results * jnp.dtype(dtype).itemsize
    return pl.CostEstimate(2 * results * contracted, bytes_, 0)
