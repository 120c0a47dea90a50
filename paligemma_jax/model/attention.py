"""Grouped-query attention with a softcap, which `jax.nn.dot_product_attention` lacks."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from paligemma_jax.kernels.attention import fused_attention, position_bounds
from paligemma_jax.model.config import AttentionForm
from paligemma_jax.model.constrain import over_shards
from paligemma_jax.model.layers import full_dtype
from paligemma_jax.model.masks import Mask, TokenSpan
from paligemma_jax.model.stages import Kind, collecting_scores, stage

CHUNK = 512  # queries at a time, so that memory grows with T and not with T squared
MASKED = -2.3819763e38  # finite: a row that attends to nothing (a pad) gets a mean, not NaN


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    scale: float,
    softcap: float | None = None,
    mask: Mask | None = None,
    form: AttentionForm = "plain",
) -> Float[Array, "B T N H"]:
    """Attention with scores and softmax in `full_dtype`; query heads g*G ... g*G+G-1 share key
    head g.

    Args:
        scale: Factor of the scores.
        softcap: Scores become tanh(scores / softcap) * softcap, before the mask.
        mask: Which query attends to which key; without it each attends to all.
        form: "fused" writes no scores to memory. Where stages collect or change scores, it is
            "plain" all the same, and so it is with another mask than the published models'.
    """
    has_kernel = mask is None or mask.is_prefix_lm
    if form == "fused" and has_kernel and not collecting_scores():
        return _attend_fused(q, k, v, scale, softcap, mask)
    T = q.shape[1]
    if T <= CHUNK or collecting_scores():
        return _attend(q, k, v, scale, softcap, mask)
    chunks = -(-T // CHUNK)

    def split(a: Array) -> Array:
        a = jnp.pad(a, [(0, 0), (0, chunks * CHUNK - T), *[(0, 0)] * (a.ndim - 2)])
        return jnp.moveaxis(a.reshape(a.shape[0], chunks, CHUNK, *a.shape[2:]), 1, 0)

    @jax.checkpoint  # otherwise the backward pass stores the scores of every chunk
    def attend_chunk(chunk: tuple[Array, TokenSpan | None]) -> Array:
        queries, span = chunk
        return _attend(queries, k, v, scale, softcap, mask and replace(mask, queries=span))

    out = jax.lax.map(attend_chunk, jax.tree.map(split, (q, mask and mask.queries)))
    return jnp.moveaxis(out, 0, 1).reshape(q.shape[0], chunks * CHUNK, *q.shape[2:])[:, :T]


def _attend_fused(q, k, v, scale, softcap, mask):
    B, T, N, H = q.shape
    K = k.shape[2]
    bounds = None
    if mask is not None:
        queries, keys = mask.queries, mask.keys
        spans = (queries.positions, queries.prefix), (keys.positions, keys.prefix)
        bounds = position_bounds(*spans, keys.valid, mask.window)

    def run(q: Array, *rest) -> Array:
        out = fused_attention(q.reshape(*q.shape[:2], -1, H), *rest, scale=scale, softcap=softcap)
        return out.reshape(q.shape)

    grouped = q.reshape(B, T, K, N // K, H)  # query heads are on the device of their key head
    heads = "B - K"
    return over_shards(run, (heads, heads, heads, "B"), grouped, k, v, bounds).reshape(q.shape)


def _attend(q, k, v, scale, softcap, mask):
    B, T, N, H = q.shape
    K = k.shape[2]
    q = q.reshape(B, T, K, N // K, H)
    dtype = full_dtype(q.dtype)
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q, k, preferred_element_type=dtype) * scale
    allowed = None if mask is None else mask()[:, None, None]
    weights = attention_weights(scores, softcap, allowed, (B, N, T, k.shape[1]))
    return jnp.einsum("BKGTS,BSKH->BTKGH", weights.astype(v.dtype), v).reshape(B, T, N, H)


def attention_weights(
    scores: Float[Array, "*heads S"],
    softcap: float | None,
    mask: Bool[Array, "..."] | None,
    stage_shape: tuple[int, int, int, int],
) -> Float[Array, "*heads S"]:
    """Softmax over the last axis, after the softcap and then the mask.

    Stages have the shape [B, N, T, S]. The softmax keeps the shape of `scores`, because XLA sums
    another shape in another order.
    """

    def named(name: str, a: Array, kind: Kind) -> Array:
        return stage(name, a.reshape(stage_shape), kind).reshape(a.shape)

    if softcap is not None:
        scores = jnp.tanh(scores / softcap) * softcap
    scores = named("scores", scores, "detail")
    scores = scores if mask is None else jnp.where(mask, scores, MASKED)
    return named("weights", jax.nn.softmax(scores, axis=-1), "attention")
