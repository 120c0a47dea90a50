"""Kernel bodies of attention whose scores stay on the chip (FlashAttention, arXiv:2205.14135,
arXiv:2307.08691), for TPUs and GPUs.

Scores are kept transposed, keys by queries: maxima and sums over the keys then run along sublanes,
and all that belongs to a query is a row. One program sees one row of the batch and one head:

    q, g, out, dq    [1, 1, T, H]       queries, gradient of the result, result
    k, v, dk, dv     [1, 1, S, H]       keys and values
    queries          int32[1, 3, T]     or None: every query attends to every key
    keys             int32[1, S, 2]     see `attention.position_bounds`
    lse, delta       float32[1, 1, 1, T]    log2 of the sum of exponentials; sum of g * out
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from paligemma_jax.kernels.tiles import dot

MASKED = -(2.0**30)  # finite: differences of masked scores are numbers
TINY = 2.0**-100  # less than any sum of exponentials, so that a query without keys has 0
LOG2E = math.log2(math.e)
Rows = slice | pl.Slice
ALL = slice(None)
Carry = TypeVar("Carry")


@dataclass(frozen=True)
class Scores:
    """How products of keys and queries become scores."""

    scale: float
    softcap: float | None

    @property
    def bounded(self) -> bool:
        """Whether exponentials of scores are within float32 without subtracting the largest."""
        return self.softcap is not None and self.softcap * LOG2E < 80

    def __call__(self, k: Array, q: Array, allowed: Array | None) -> tuple[Array, Array | None]:
        """float32[S, T] scores in units of log 2, and the tanh of the softcap."""
        products = dot(k, q, 1, 1)
        if self.softcap is None:
            scores, tanh = products * (self.scale * LOG2E), None
        else:
            tanh = jnp.tanh(products * (self.scale / self.softcap))
            scores = tanh * (self.softcap * LOG2E)
        return scores if allowed is None else jnp.where(allowed, scores, MASKED), tanh


def allowed_pairs(keys, queries, key_rows: Rows = ALL, query_rows: Rows = ALL) -> Array | None:
    """bool[S, T]: `prefix_lm_mask` of a block of keys and a block of queries."""
    if keys is None:
        return None
    position, prefix = (keys[0, key_rows, i : i + 1] for i in range(2))
    first, last, prefix_last = (queries[0, i : i + 1, query_rows] for i in range(3))
    return ((first <= position) & (position <= last)) | (prefix <= prefix_last)


def over_blocks(step: Callable[[Rows, Carry], Carry], size: int, block: int, carry: Carry) -> Carry:
    """Run carry = step(rows, carry) for the rows of every block, a shorter last one included."""

    def run(i: Array, carry: Carry) -> Carry:
        return step(pl.ds(pl.multiple_of(i * block, block), block), carry)

    carry = jax.lax.fori_loop(0, size // block, run, carry)
    rest = size % block
    return step(pl.ds(size - rest, rest), carry) if rest else carry


def forward(queries, keys, q, k, v, out, lse, *, scores: Scores, block: int):
    """One block of queries against all keys, `block` at a time."""
    query = q[0, 0]
    T, H = query.shape

    def step(rows: Rows, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        total, summed, largest = carry
        s, _ = scores(k[0, 0, rows], query, allowed_pairs(keys, queries, key_rows=rows))
        if not scores.bounded:
            new = jnp.maximum(largest, jnp.max(s, axis=0, keepdims=True))
            correction = jnp.exp2(largest - new)
            s, largest = s - new, new
            total, summed = total * correction, summed * correction
        p, value = jnp.exp2(s), v[0, 0, rows]
        total += dot(value, p.astype(value.dtype), 0, 0)
        return total, summed + jnp.sum(p, axis=0, keepdims=True), largest

    row = jnp.zeros((1, T))
    start = jnp.zeros((H, T)), row, row if scores.bounded else row + MASKED
    total, summed, largest = over_blocks(step, k.shape[2], block, start)
    summed = jnp.maximum(summed, TINY)
    out[0, 0] = (total / summed).T.astype(out.dtype)
    lse[0, 0] = largest + jnp.log2(summed)


def backward(
    queries, keys, q, k, v, g, lse, delta, dk, dv, dq=None, *, scores: Scores, block: int, size: int
):
    """One block of keys against all queries, `block` at a time.

    `dq` is summed over the blocks of keys if they run one after the other, as on a TPU. Of the last
    block, only the keys below `size` exist.
    """
    key, value, exists = k[0, 0], v[0, 0], None
    if size % len(key):
        row = jax.lax.broadcasted_iota(jnp.int32, (len(key), 1), 0)
        exists = row < size - pl.program_id(2) * len(key)
        key, value = jnp.where(exists, key, 0), jnp.where(exists, value, 0)
    if dq is not None:

        @pl.when(pl.program_id(2) == 0)
        def _():
            dq[...] = jnp.zeros_like(dq)

    def step(rows: Rows, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        query, gradient = q[0, 0, rows], g[0, 0, rows]
        allowed = allowed_pairs(keys, queries, query_rows=rows)
        if exists is not None:
            allowed = exists if allowed is None else allowed & exists
        p, ds = _gradients(
            scores, key, value, query, gradient, allowed, lse[0, 0, :, rows], delta[0, 0, :, rows]
        )
        if dq is not None:
            dq[0, 0, rows] += dot(ds, key, 0, 0)
        return carry[0] + dot(ds, query, 1, 0), carry[1] + dot(p, gradient, 1, 0)

    zeros = jnp.zeros(key.shape, jnp.float32)
    key_total, value_total = over_blocks(step, q.shape[2], block, (zeros, zeros))
    dk[0, 0] = (scores.scale * key_total).astype(dk.dtype)
    dv[0, 0] = value_total.astype(dv.dtype)


def query_gradient(queries, keys, q, k, v, g, lse, delta, dq, *, scores: Scores, block: int):
    """One block of queries against all keys: `dq` alone, where blocks of keys run in parallel."""
    query, gradient = q[0, 0], g[0, 0]

    def step(rows: Rows, total: Array) -> Array:
        key = k[0, 0, rows]
        allowed = allowed_pairs(keys, queries, key_rows=rows)
        _, ds = _gradients(
            scores, key, v[0, 0, rows], query, gradient, allowed, lse[0, 0], delta[0, 0]
        )
        return total + dot(ds, key, 0, 0)

    dq[0, 0] = over_blocks(step, k.shape[2], block, jnp.zeros(query.shape, jnp.float32))


def _gradients(
    scores: Scores, k, v, q, g, allowed: Array | None, lse: Array, delta: Array
) -> tuple[Array, Array]:
    """[S, T] attention weights, and the gradient of the products of keys and queries, which the
    scale is left out of."""
    s, tanh = scores(k, q, allowed)
    p = jnp.exp2(s - lse)
    ds = p * (dot(v, g, 1, 1) - delta)
    if tanh is not None:
        ds *= 1 - tanh * tanh
    return p.astype(g.dtype), ds.astype(q.dtype)
