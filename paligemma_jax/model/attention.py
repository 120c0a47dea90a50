"""Scores, softcap, mask, softmax. `jax.nn.dot_product_attention` has no softcap."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from paligemma_jax.model.cache import Int8
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
    weights = _softmax(scores, softcap, None if mask is None else prefix_lm_mask(*mask)[:, None, None])
    if collects_attention():
        stage("weights", weights.reshape(B, N, T, -1))
    return jnp.einsum("BKGTS,BSKH->BTKGH", weights.astype(v.dtype), v).reshape(B, T, N, H)


def attend_cached(q: Array, new: tuple[Array, Array], cached: tuple[Any, Any], slot: Array, *, scale, softcap, mask: tuple) -> Array:
    """`attend` for one query a row, q [B, 1, N, H], over cached k, v [B, S, K, H] and its own [B, 1, K, H], whose place in the cache is `slot`.

    What is cached in 8 bits (`Int8`) is multiplied as it is: a key's scale goes into its score, a value's into its weight.

    Two things make it as fast as the cache can be read (XLA on a CPU, 4,400 slots: 4 times). Its own k and v are not in the cache yet:
    to read what was just written makes XLA copy it. And k and v are read as they lie, [B, S, K*H], which a product by heads would
    transpose: each query head has zeros in the place of the key heads that are not its own, and takes its own from what comes out.
    """
    (k, k_scale), (v, v_scale) = ((a.codes, a.scale) if isinstance(a, Int8) else (a, None) for a in cached)
    (B, S, K, H), G = k.shape, q.shape[2] // new[0].shape[2]
    k, v = (a.reshape(B, S, K * H).astype(q.dtype) for a in (k, v))
    by_head = lambda scale: 1 if scale is None else jnp.repeat(jnp.moveaxis(scale[..., 0], 2, 1), G, axis=1)  # [B, S, K, 1] -> [B, N, S]
    q = q.reshape(B, K, G, H)
    wide = jnp.einsum("BKGH,KL->BKGLH", q, jnp.eye(K, dtype=q.dtype)).reshape(B, K * G, K * H)
    scores = jnp.einsum("BNX,BSX->BNS", wide, k, preferred_element_type=jnp.float32) * by_head(k_scale)
    own = jnp.einsum("BKGH,BKH->BKG", q, new[0][:, 0], preferred_element_type=jnp.float32).reshape(B, K * G, 1)
    scores = jax.lax.dynamic_update_slice_in_dim(scores, own, slot, axis=2) * scale
    weights = _softmax(scores, softcap, prefix_lm_mask(*mask)).astype(v.dtype)
    own = jax.lax.dynamic_slice_in_dim(weights, slot, 1, axis=2)
    weights = jax.lax.dynamic_update_slice_in_dim(weights, jnp.zeros_like(own), slot, axis=2)
    weights = (weights * by_head(v_scale)).astype(v.dtype)
    out = jnp.einsum("BNS,BSX->BNX", weights, v).reshape(B, K, G, K, H)
    out = jnp.einsum("BKGKH->BKGH", out) + own.reshape(B, K, G, 1) * new[1].reshape(B, K, 1, H)
    return out.reshape(B, 1, K * G, H)


def _softmax(scores: Array, softcap: float | None, mask: Array | None) -> Array:
    """Over the last axis; the softcap comes before the mask."""
    if softcap is not None:
        scores = jnp.tanh(scores / softcap) * softcap
    return jax.nn.softmax(scores if mask is None else jnp.where(mask, scores, MASKED), axis=-1)
