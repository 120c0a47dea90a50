"""Read 4- and 8-bit codes into the registers of a TPU, as the columns of a matrix.

A register is 8 sublanes of 128 lanes of 32 bits, and four rows of bytes share one. The vector unit
is the bottleneck, so operations are counted per register of weights:

- The nibbles of a byte are neighbors along the contracted axis. A gather along lanes copies each
  byte, of four rows at once, to two neighboring lanes, one of which is then shifted by four bits.
- A register is a table of 8 entries per lane. A gather along sublanes looks up 1024 codes in one
  operation; a table of 16 takes two and a selection, or, in bfloat16, one and a shift.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

LANES, SUBLANES = 128, 8
COLUMNS = 256  # read at a time: of 4-bit codes, the bytes in a register's lanes


@dataclass(frozen=True)
class CodeReader:
    """The meaning of codes: `table` has the 16 values of 4-bit codes in units of their scale, and
    `block` is the number of columns per scale. Without a table codes are int8, with one scale per
    row."""

    table: tuple[float, ...] = ()
    block: int = 0

    @property
    def packs_bfloat16(self) -> bool:
        """Whether `_shifted` can read the table."""
        return min(self.table[8:], default=-1) >= 0

    def width(self, columns: int) -> int:
        """Stored numbers per row of this many columns."""
        return columns // 2 if self.table else columns

    def tile(
        self, codes: jax.Ref, rows: slice | pl.Slice, step: Array, dtype: DTypeLike
    ) -> list[Array]:
        """Columns 256 * step + (0..255) of some rows, in units of their scale: two of [R, 128].

        Args:
            dtype: bfloat16 rounds the values of 4-bit codes if `packs_bfloat16`; float32 does not.
        """
        if not self.table:
            starts = [pl.multiple_of(step * COLUMNS + i, LANES) for i in (0, LANES)]
            return [codes[rows, pl.ds(start, LANES)].astype(jnp.float32) for start in starts]
        bytes_ = codes[rows, pl.ds(pl.multiple_of(step * LANES, LANES), LANES)]
        words = pltpu.bitcast(bytes_, jnp.int32)
        lane = jax.lax.broadcasted_iota(jnp.int32, words.shape, 1)
        look_up = _shifted if dtype == jnp.bfloat16 else _selected
        halves = []
        for first in (0, LANES // 2):
            byte = gather(words, (lane >> 1) + first, axis=1)
            nibbles = jax.lax.shift_right_logical(byte, 4 - 4 * (lane & 1))
            index, high = _bytes(nibbles, 0x07070707), _bytes(nibbles << 1, 0x10101010)
            halves.append(look_up(self.table, index, high))
        return halves


def log2(size: int) -> int:
    return size.bit_length() - 1


def _bytes(words: Array, mask: int) -> Array:
    """int32[4R, 128]: the bytes of int32[R, 128] words, in the order of their rows."""
    return pltpu.bitcast(words & jnp.int32(mask), jnp.int8).astype(jnp.int32)


def _selected(table: Sequence[float], index: Array, high: Array) -> Array:
    """float32: the values index + 8 * (high > 0) of the table."""
    low, upper = (gather(_entries(half), index, axis=0) for half in (table[:8], table[8:]))
    return jnp.where(high > 0, upper, low)


def _shifted(table: Sequence[float], index: Array, high: Array) -> Array:
    """bfloat16: the values index + 8 * (high > 0) of the table, if `high` is 0 or 16.

    The upper half of an entry is a low value. The lower half is a high value, which must not be
    negative: rounding to bfloat16 then removes it.
    """
    bits = np.asarray(table, jnp.bfloat16).view(np.uint16).astype(np.uint32)
    values = _entries((bits[:8] << 16 | bits[8:]).view(np.int32).tolist())
    return pltpu.bitcast(gather(values, index, axis=0) << high, jnp.float32).astype(jnp.bfloat16)


def _entries(values: Sequence[float]) -> Array:
    """[8, 128]: one value per sublane."""
    sublane = jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), 0)
    dtype = jnp.int32 if isinstance(values[0], int) else jnp.float32
    table = jnp.full((SUBLANES, LANES), values[0], dtype)
    for i, value in enumerate(values[1:], start=1):
        table = jnp.where(sublane == i, jnp.asarray(value, dtype), table)
    return table


def gather(values: Array, index: Array, axis: int) -> Array:
    """`jnp.take_along_axis` in each register of `index`, without its three operations for negative
    indices. `values` are as many registers, or one."""
    numbers = jax.lax.GatherDimensionNumbers(
        offset_dims=(),
        collapsed_slice_dims=(axis,),
        start_index_map=(axis,),
        operand_batching_dims=(1 - axis,),
        start_indices_batching_dims=(1 - axis,),
    )
    in_bounds = jax.lax.GatherScatterMode.PROMISE_IN_BOUNDS
    registers = [SUBLANES] * (len(index) // SUBLANES)
    indices = jax.lax.split(index, registers)
    sources = (
        jax.lax.split(values, registers) if len(values) > SUBLANES else [values] * len(indices)
    )
    gathered = [
        jax.lax.gather(source, jax.lax.expand_dims(i, [2]), numbers, (1, 1), mode=in_bounds)
        for source, i in zip(sources, indices, strict=True)
    ]
    return jax.lax.concatenate(gathered, 0)
