"""Who sees whom: one function for teacher forcing, prefill and decoding, local and global layers."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Span:
    """What a mask has to know of a sequence of tokens."""

    positions: Array  # int32[B, T], contiguous over the valid tokens of a row; of no meaning on pads
    prefix: Array  # bool[B, T], image and prompt
    valid: Array  # bool[B, T], False on pads


def prefix_lm_mask(queries: Span, keys: Span, window: Array | int) -> Array:
    """bool[B, T, S]: may query t look at key s?

    Image and prompt (p) see each other both ways, the answer (a) is causal, nobody sees pads (-):

                keys  - p p p a a a         and with window 3:    - p p p a a a
        query p       . x x x . . .         (the window never     . x x x . . .
              p       . x x x . . .          narrows the prefix,  . x x x . . .
              p       . x x x . . .          only what is causal) . x x x . . .
              a       . x x x x . .                               . . x x x . .
              a       . x x x x x .                               . . . x x x .
              a       . x x x x x x                               . . . . x x x

    Everything goes by position, never by index, so padding and cache layout cannot change it.
    Source: transformers 5.23 `create_causal_mask_mapping` (`block_sequence_ids` OR sliding window).
    """
    t, s = queries.positions[:, :, None], keys.positions[:, None, :]
    causal = (s <= t) & (s > t - window)
    block = queries.prefix[:, :, None] & keys.prefix[:, None, :]
    return (causal | block) & keys.valid[:, None, :]


def span(valid: Array, prefix: Array, first_position: int) -> Span:
    """The `Span` of rows whose tokens are valid[B, T] and, of those, image or prompt where prefix[B, T]."""
    positions = jnp.cumsum(valid, axis=1, dtype=jnp.int32) - 1 + first_position
    return Span(positions, prefix & valid, valid)
