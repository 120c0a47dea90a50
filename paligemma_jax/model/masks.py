"""Which query attends to which key: one rule for teacher forcing, prefill and decoding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

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
    segment: Int[Array, "*B T"] | None = None  # the example of each token, if rows have several


# (queries, keys, window) -> True where query t may attend to key s
MaskRule = Callable[[TokenSpan, TokenSpan, "Array | int"], Array]


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

    The rule reads positions, never indices, so padding and cache layout cannot change it. Tokens
    attend within their own segment.
    Source: transformers 5.23 `create_causal_mask_mapping` (`block_sequence_ids` OR sliding window).
    """
    t, s = queries.positions[:, :, None], keys.positions[:, None, :]
    causal = (s <= t) & (s > t - window)
    block = queries.prefix[:, :, None] & keys.prefix[:, None, :]
    allowed = (causal | block) & keys.valid[:, None, :]
    if queries.segment is None or keys.segment is None:
        return allowed
    return allowed & (queries.segment[:, :, None] == keys.segment[:, None, :])


def windowed_mask(
    queries: TokenSpan, keys: TokenSpan, window: Int[Array, ""] | int
) -> Bool[Array, "B T S"]:
    """`prefix_lm_mask`, where the window narrows image and prompt as well: no query attends to a
    key that is `window` or more tokens before it (transformers 4.47 to 4.52)."""
    t, s = queries.positions[:, :, None], keys.positions[:, None, :]
    return prefix_lm_mask(queries, keys, window) & (s > t - window)


def two_sided_mask(
    queries: TokenSpan, keys: TokenSpan, window: Int[Array, ""] | int
) -> Bool[Array, "B T S"]:
    """`windowed_mask`, where image and prompt attend to no key that is `window` or more tokens
    after them either (keras-hub)."""
    t, s = queries.positions[:, :, None], keys.positions[:, None, :]
    return windowed_mask(queries, keys, window) & (s < t + window)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Mask:
    """A rule and its arguments."""

    queries: TokenSpan
    keys: TokenSpan
    window: Int[Array, ""] | int
    rule: MaskRule = field(default=prefix_lm_mask, metadata=dict(static=True))

    def __call__(self) -> Bool[Array, "B T S"]:
        """Compute the mask. ValueError if the rule returns something else."""
        allowed = self.rule(self.queries, self.keys, self.window)
        expected = (*self.queries.positions.shape, self.keys.positions.shape[-1])
        if jnp.shape(allowed) != expected or jnp.result_type(allowed) != jnp.bool_:
            raise ValueError(
                f"a mask rule must return bool{list(expected)}, "
                f"got {jnp.result_type(allowed)}{list(jnp.shape(allowed))}"
            )
        return allowed

    @property
    def is_prefix_lm(self) -> bool:
        """Whether the rule is that of the published models, which fused attention has too."""
        return self.rule is prefix_lm_mask and self.queries.segment is None


def token_span(
    valid: Bool[Array, "B T"],
    prefix: Bool[Array, "B T"],
    first_position: int,
    segments: Int[Array, "B T"] | None = None,
) -> TokenSpan:
    """The span of a batch, with positions counted from the first valid token of each row, or of
    each of its segments."""
    positions = jnp.cumsum(valid, axis=1, dtype=jnp.int32) - 1
    if segments is not None:
        before = jnp.pad(segments[:, :-1], [(0, 0), (1, 0)], constant_values=-1)
        starts = jnp.where(segments != before, positions, 0)
        positions -= jax.lax.cummax(starts, axis=1)
    return TokenSpan(positions + first_position, prefix & valid, valid, segments)
