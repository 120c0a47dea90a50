"""Which query attends to which key: one rule for teacher forcing, prefill and decoding."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TokenSpan:
    """The properties of a sequence of tokens that determine a mask."""

    positions: Int[Array, "*B T"]  # contiguous over a row's valid tokens; arbitrary on pads
    prefix: Bool[Array, "*B T"]  # True on image and prompt
    valid: Bool[Array, "*B T"]  # False on pads


def prefix_lm_mask(
    queries: TokenSpan, keys: TokenSpan, window: Int[Array, ""] | int
) -> Bool[Array, "B T S"]:
    """True where query t attends to key s.

    Image and prompt (p) attend to each other both ways, the answer (a) is causal, and nothing
    attends to pads (-):

                keys  - p p p a a a         and with window 3:    - p p p a a a
        query p       . x x x . . .         (the window never     . x x x . . .
              p       . x x x . . .          narrows the prefix,  . x x x . . .
              p       . x x x . . .          only what is causal) . x x x . . .
              a       . x x x x . .                               . . x x x . .
              a       . x x x x x .                               . . . x x x .
              a       . x x x x x x                               . . . . x x x

    The rule reads positions, never indices, so padding and cache layout cannot change it.
    Source: transformers 5.23 `create_causal_mask_mapping` (`block_sequence_ids` OR sliding window).
    """
    t, s = queries.positions[:, :, None], keys.positions[:, None, :]
    causal = (s <= t) & (s > t - window)
    block = queries.prefix[:, :, None] & keys.prefix[:, None, :]
    return (causal | block) & keys.valid[:, None, :]


def token_span(
    valid: Bool[Array, "B T"], prefix: Bool[Array, "B T"], first_position: int
) -> TokenSpan:
    """The span of a batch, with positions counted from each row's first valid token."""
    positions = jnp.cumsum(valid, axis=1, dtype=jnp.int32) - 1 + first_position
    return TokenSpan(positions, prefix & valid, valid)
