"""Scores, softcap, mask, softmax. `jax.nn.dot_product_attention` has no softcap."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from paligemma_jax.model.layers import collects_attention, stage
from paligemma_jax.model.masks import Span, prefix_lm_mask

CHUNK = 512  # queries at a time, so that memory grows with T and not with T squared
MASKED = -2.3819763e38  # finite: a row that sees nothing (a pad) gets a mean, not NaN


def attend(q: Array, k: Array, v: Array, *, scale: float, softcap: float | None = None, mask: tuple[Span, Span, Array | int] | None = None) -> Array:
    """Grouped-query attention of q [B, T, N, H] over k, v [B, S, K, H] -> [B, T, N, H]; scores and softmax in float32.

    Query heads g*G .. g*G+G-1 share key/value head g. `mask` holds the arguments of `prefix_lm_mask` (None: all see all).
    """
    T = q.shape[1]
    if T <= CHUNK or collects_attention():
        return _attend(q, k, v, scale, softcap, mask)
    queries = (q, mask and mask[0])
    chunks = -(-T // CHUNK)

    def split(a: Array) -> Array:
        a = jnp.pad(a, [(0, 0), (0, chunks * CHUNK - T), *[(0, 0)] * (a.ndim - 2)])
        return jnp.moveaxis(a.reshape(a.shape[0], chunks, CHUNK, *a.shape[2:]), 1, 0)

    @jax.checkpoint  # else the gradient keeps the scores of every chunk
    def one(chunk: tuple[Array, Span | None]) -> Array:
        return _attend(chunk[0], k, v, scale, softcap, mask and (chunk[1], *mask[1:]))

    out = jax.lax.map(one, jax.tree.map(split, queries))
    return jnp.moveaxis(out, 0, 1).reshape(q.shape[0], chunks * CHUNK, *q.shape[2:])[:, :T]


def _attend(q, k, v, scale, softcap, mask):
    B, T, N, H = q.shape
    K = k.shape[2]
    q = q.reshape(B, T, K, N // K, H)
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q, k, preferred_element_type=jnp.float32) * scale
    if softcap is not None:  # before the mask
        scores = jnp.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = jnp.where(prefix_lm_mask(*mask)[:, None, None], scores, MASKED)
    weights = jax.nn.softmax(scores, axis=-1)
    if collects_attention():
        stage("weights", weights.reshape(B, N, T, -1))
    return jnp.einsum("BKGTS,BSKH->BTKGH", weights.astype(v.dtype), v).reshape(B, T, N, H)
