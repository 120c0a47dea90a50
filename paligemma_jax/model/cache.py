"""The KV cache, a pytree that the model takes and returns."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Float32, Int, Int8

from paligemma_jax.model.constrain import constrain
from paligemma_jax.model.masks import TokenSpan

TILE = 32  # 8-bit numbers that share a tile of a TPU along the last axis but one


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Int8Array:
    """Keys or values in 8 bits, with one scale per head and slot that maps its maximum to 127."""

    codes: Int8[Array, "*L B S X"]
    scale: Float32[Array, "*L B K S"]

    @classmethod
    def quantize(cls, x: Float[Array, "*L B S K H"]) -> Int8Array:
        x = x.astype(jnp.float32)
        scale = jnp.max(jnp.abs(x), axis=-1, keepdims=True) / 127
        codes = jnp.round(x / jnp.maximum(scale, 1e-30)).astype(jnp.int8)
        return cls(join_heads(codes), jnp.swapaxes(scale[..., 0], -1, -2))

    def write(self, new: Int8Array, slot: Int[Array, ""]) -> Int8Array:
        """Replace one slot.

        TPUs tile 32 slots of codes, and would copy all of them to other tiles and back to update
        one; so the tile that contains the slot is rewritten, and the few scales all together.
        """
        axis, S = self.codes.ndim - 2, self.codes.shape[-2]
        size = math.gcd(TILE, S)
        start = slot // size * size
        tile = jax.lax.dynamic_slice_in_dim(self.codes, start, size, axis)
        tile = jnp.where((start + jnp.arange(size) == slot)[:, None], new.codes, tile)
        codes = jax.lax.dynamic_update_slice_in_dim(self.codes, tile, start, axis)
        return Int8Array(codes, jnp.where(jnp.arange(S) == slot, new.scale, self.scale))


# Heads are joined, so that slots are next to the last axis: TPUs tile the last two axes, and would
# copy an array [B, S, K, H] into another layout before the first token and back after the last.
CachedArray = Array | Int8Array  # [B, S, X]
CachedLayers = list[CachedArray] | CachedArray  # a list over layers, or [L, B, S, X] if stacked


def join_heads(x: Array) -> Array:
    """[..., K, H] -> [..., K*H]."""
    return x.reshape(*x.shape[:-2], -1)


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
        used = span.valid.shape[1]
        if slots < used:
            raise ValueError(f"the cache must have at least {used} slots, got {slots}")

        def pad(a: Array, axis: int) -> Array:
            return jnp.pad(a, [(0, slots - used if i == axis else 0) for i in range(a.ndim)])

        def allocate(a: Array) -> CachedArray:
            a = constrain("L B S K" if a.ndim == 5 else "B S K", pad(a, a.ndim - 3))
            return Int8Array.quantize(a) if dtype == "int8" else join_heads(a)

        k, v = jax.tree.map(allocate, (k, v))
        return cls(k, v, jax.tree.map(lambda a: pad(a, 1), span), jnp.int32(used))

    def take_rows(self, order: Int[Array, " rows"]) -> KVCache:
        """The cache of rows order[0], order[1], ...; rows may repeat or be left out."""
        k, v = jax.tree.map(lambda a: jnp.take(a, order, axis=a.ndim - 3), (self.k, self.v))
        return replace(self, k=k, v=v, span=jax.tree.map(lambda a: a[order], self.span))

    def put_rows(self, new: KVCache, rows: Int[Array, " b"]) -> KVCache:
        """The cache with its rows `rows` replaced by those of `new`, whose slots go directly before
        the next one, around the end of the cache if need be. Rows beyond the last are left out."""
        S, used = self.span.valid.shape[1], new.length

        def put(old: Array, value: Array, slots: int, rows_axis: int) -> Array:
            widths = [(0, 0)] * value.ndim
            widths[slots] = 0, S - value.shape[slots]
            value = jnp.roll(jnp.pad(value, widths), self.length - used, slots)
            return old.at[(slice(None),) * rows_axis + (rows,)].set(value, mode="drop")

        def put_array(old: CachedArray, value: Any) -> CachedArray:
            if not isinstance(old, Int8Array):
                return put(old, value, -2, old.ndim - 3)
            axis = old.codes.ndim - 3
            codes = put(old.codes, value.codes, -2, axis)
            return Int8Array(codes, put(old.scale, value.scale, -1, axis))

        k, v = jax.tree.map(
            put_array, (self.k, self.v), (new.k, new.v), is_leaf=lambda a: isinstance(a, Int8Array)
        )
        span = jax.tree.map(lambda old, value: put(old, value, -1, 0), self.span, new.span)
        return replace(self, k=k, v=v, span=span)

    def extend(self, position: Int[Array, " B"]) -> KVCache:
        """Mark one more slot as valid, at `position` of each row; `write` fills it."""
        no = jnp.zeros_like(position, bool)[:, None]
        new = TokenSpan(position[:, None], prefix=no, valid=~no)

        def put(slots: Array, value: Array) -> Array:
            return jax.lax.dynamic_update_slice_in_dim(slots, value, self.length, axis=1)

        return replace(self, span=jax.tree.map(put, self.span, new), length=self.length + 1)

    def write(self, k: CachedLayers, v: CachedLayers, after: Float[Array, "B 1 D"]) -> KVCache:
        """Fill the last slot with the keys and values of one token.

        `after` is a value computed from the cache's previous contents. It is added times zero, so
        that the write waits for the reads; otherwise XLA on a CPU copies the cache to do both at
        once.
        """
        wait, slot = 0 * after[:, :, :1, None], self.length - 1

        def put(slots: CachedArray, new: Array) -> CachedArray:
            new = new + wait.astype(new.dtype)
            if isinstance(slots, Int8Array):
                return slots.write(Int8Array.quantize(new), slot)
            new = join_heads(new)
            return jax.lax.dynamic_update_slice_in_dim(slots, new, slot, axis=slots.ndim - 2)

        k, v = jax.tree.map(
            put, (self.k, self.v), (k, v), is_leaf=lambda a: isinstance(a, Int8Array)
        )
        return replace(self, k=k, v=v)
