"""The KV cache, a pytree that the model takes and returns."""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Float32, Int, Int8

from paligemma_jax.model.constrain import constrain
from paligemma_jax.model.masks import TokenSpan


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Int8Array:
    """Keys or values in 8 bits, with one scale per head and slot that maps its maximum to 127."""

    codes: Int8[Array, "*slots H"]
    scale: Float32[Array, "*slots 1"]

    @classmethod
    def quantize(cls, x: Float[Array, "*slots H"]) -> Int8Array:
        x = x.astype(jnp.float32)
        scale = jnp.max(jnp.abs(x), axis=-1, keepdims=True) / 127
        return cls(jnp.round(x / jnp.maximum(scale, 1e-30)).astype(jnp.int8), scale)


CachedArray = Array | Int8Array  # [B, S, K, H]
CachedLayers = list[CachedArray] | CachedArray  # a list over layers, or [L, B, S, K, H] if stacked


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """Keys (after RoPE) and values of every layer, allocated at full length.

    All rows fill the same slots, so a pad in one row is just an invalid slot.
    """

    k: CachedLayers
    v: CachedLayers
    span: TokenSpan  # of the S slots, shared by all layers
    length: Int[Array, ""]  # slots in use

    @classmethod
    def from_prefill(
        cls, k: CachedLayers, v: CachedLayers, span: TokenSpan, slots: int, dtype: str | None = None
    ) -> KVCache:
        """A cache of `slots` slots that starts with the T tokens of a prefill.

        Args:
            k, v: Keys and values of T slots.
            span: Span of the T tokens.
            slots: At least T.
            dtype: "int8", or None to keep the arrays' own.
        """
        if dtype == "int8":
            k, v = jax.tree.map(Int8Array.quantize, (k, v))
        used = span.valid.shape[1]
        if slots < used:
            raise ValueError(f"the cache must have at least {used} slots, got {slots}")

        def pad(a: Array, axis: int) -> Array:
            return jnp.pad(a, [(0, slots - used if i == axis else 0) for i in range(a.ndim)])

        def allocate(a: Array) -> Array:
            return constrain("L B S K" if a.ndim == 5 else "B S K", pad(a, a.ndim - 3))

        k, v = jax.tree.map(allocate, (k, v))
        return cls(k, v, jax.tree.map(lambda a: pad(a, 1), span), jnp.int32(used))

    def take_rows(self, order: Int[Array, " rows"]) -> KVCache:
        """The cache of rows order[0], order[1], ...; rows may repeat or be left out."""
        k, v = jax.tree.map(lambda a: jnp.take(a, order, axis=a.ndim - 4), (self.k, self.v))
        return replace(self, k=k, v=v, span=jax.tree.map(lambda a: a[order], self.span))

    def extend(self, position: Int[Array, " B"]) -> KVCache:
        """Mark one more slot as valid, at `position` of each row; `write` fills it."""
        no = jnp.zeros_like(position, bool)[:, None]
        new = TokenSpan(position[:, None], prefix=no, valid=~no)

        def put(slots: Array, value: Array) -> Array:
            return jax.lax.dynamic_update_slice(slots, value, (0, self.length))

        return replace(self, span=jax.tree.map(put, self.span, new), length=self.length + 1)

    def write(self, k: CachedLayers, v: CachedLayers, after: Float[Array, "B 1 D"]) -> KVCache:
        """Fill the last slot with the keys and values of one token.

        `after` is a value computed from the cache's previous contents. It is added times zero, so
        that the write waits for the reads; otherwise XLA on a CPU copies the cache to do both at
        once.
        """
        if jax.tree.structure(k) != jax.tree.structure(self.k):
            k, v = jax.tree.map(Int8Array.quantize, (k, v))
        wait, slot = 0 * after[:, :, :1, None], self.length - 1

        def put(slots: Array, new: Array) -> Array:
            new = new + wait.astype(new.dtype)
            return jax.lax.dynamic_update_slice_in_dim(slots, new, slot, axis=slots.ndim - 3)

        return replace(self, k=jax.tree.map(put, self.k, k), v=jax.tree.map(put, self.v, v))
