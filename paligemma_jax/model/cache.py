"""The KV cache: a value that goes in and comes out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from paligemma_jax.model.layers import place
from paligemma_jax.model.masks import Span


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Int8:
    """Keys or values in 8 bits, with one scale for each head and slot: the largest magnitude of its H numbers is 127."""

    codes: Array  # int8 [..., H]
    scale: Array  # float32 [..., 1]

    @classmethod
    def of(cls, x: Array) -> Int8:
        wide = x.astype(jnp.float32)
        scale = jnp.max(jnp.abs(wide), axis=-1, keepdims=True) / 127
        return cls(jnp.round(wide / jnp.maximum(scale, 1e-30)).astype(jnp.int8), scale)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """Keys (after RoPE) and values of every layer, full length; all rows fill the same slots, so a pad in one row is just an invalid slot."""

    k: Any  # list over layers of [B, S, K, H], or [L, B, S, K, H] with stacked layers; of arrays, or of `Int8` of them
    v: Any
    span: Span  # of the S slots, shared by all layers
    length: Array  # int32: the number of slots in use

    @classmethod
    def of(cls, k: Any, v: Any, span: Span, slots: int, held: str | None = None) -> KVCache:
        """A cache of `slots` slots whose first T hold what a prefill computed: k, v arrays as in the fields but of T slots.

        held: "int8", or None for their own dtype.
        """
        if held == "int8":
            k, v = jax.tree.map(Int8.of, (k, v))
        used = span.valid.shape[1]
        if slots < used:
            raise ValueError(f"a cache of {slots} slots cannot hold {used} tokens")

        def pad(axis: int):
            return lambda a: jnp.pad(a, [(0, slots - used if i == axis else 0) for i in range(a.ndim)])

        k, v = jax.tree.map(lambda a: place("L rows S K" if a.ndim == 5 else "rows S K", pad(a.ndim - 3)(a)), (k, v))
        return cls(k, v, jax.tree.map(pad(1), span), jnp.int32(used))

    def rows(self, order: Array) -> KVCache:
        """The cache of rows order[0], order[1], ...; a row may come several times, or not at all."""
        k, v = jax.tree.map(lambda a: jnp.take(a, order, axis=a.ndim - 4), (self.k, self.v))
        return replace(self, k=k, v=v, span=jax.tree.map(lambda a: a[order], self.span))

    def extend(self, position: Array) -> KVCache:
        """One more valid slot at position int32[B]; its k and v are written by `write`."""
        new = Span(position[:, None], jnp.zeros_like(position, bool)[:, None], jnp.ones_like(position, bool)[:, None])
        span = jax.tree.map(lambda slots, one: jax.lax.dynamic_update_slice(slots, one, (0, self.length)), self.span, new)
        return replace(self, span=span, length=self.length + 1)

    def write(self, k: Any, v: Any, after: Array) -> KVCache:
        """With k and v of the last slot, arrays as in the fields but of one token. `after` [B, 1, D]: what was computed from the cache before.

        It is added times zero, so that the write has to wait for the reads: else XLA on a CPU copies the cache, to be able to do both at once.
        """
        if jax.tree.structure(k) != jax.tree.structure(self.k):
            k, v = jax.tree.map(Int8.of, (k, v))
        wait, slot = 0 * after[:, :, :1, None], self.length - 1

        def put(slots: Array, new: Array) -> Array:
            return jax.lax.dynamic_update_slice_in_dim(slots, new + wait.astype(new.dtype), slot, axis=slots.ndim - 3)

        return replace(self, k=jax.tree.map(put, self.k, k), v=jax.tree.map(put, self.v, v))
