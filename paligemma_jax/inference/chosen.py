"""Chosen tokens, and what the model says about them and about the tokens in their place."""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Int, Int32

from paligemma_jax.model.layers import FullFloat
from paligemma_jax.processing.processor import AnyArray


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TopTokens:
    """The k most likely tokens in the place of each token, most likely first."""

    ids: Int32[AnyArray, "*places k"]
    log_probabilities: FullFloat[AnyArray, "*places k"]  # under the model, before any filter


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Chosen:
    """The tokens of B answers; a beam search has W for each of B prompts, [B, W, ...]."""

    tokens: Int32[AnyArray, "*B N"]
    log_probabilities: FullFloat[AnyArray, "*B N"]  # under the model, before any filter
    top: TopTokens | None = None  # if asked for
    logits: FullFloat[AnyArray, "*B N V"] | None = None  # of the model, if asked for

    def room(self, size: int, pad: int) -> Chosen:
        """Place for `size` tokens of each row of these, [B, size]: pads, and zeros about them."""

        def empty(a: AnyArray) -> Array:
            return jnp.zeros((a.shape[0], size, *a.shape[2:]), a.dtype)

        room = jax.tree.map(empty, self)
        return replace(room, tokens=jnp.full_like(room.tokens, pad))

    def with_top(self, k: int) -> Chosen:
        """The same with the k most likely tokens of those in `top`."""
        if self.top is None:
            return self
        top = jax.tree.map(lambda a: a[..., :k], self.top) if k else None
        return replace(self, top=top)

    def where(self, keep: Bool[AnyArray, "*B N"], pad: int) -> Chosen:
        """The same with a pad, and zeros about it, where `keep` is False."""
        numpy = np if isinstance(keep, np.ndarray) else jnp

        def zero(a: AnyArray) -> AnyArray:
            return numpy.where(keep.reshape(*keep.shape, *[1] * (a.ndim - keep.ndim)), a, 0)

        return replace(jax.tree.map(zero, self), tokens=numpy.where(keep, self.tokens, pad))


def top_tokens(
    logits: FullFloat[Array, "*rows V"], normalizer: FullFloat[Array, "*rows"], k: int
) -> TopTokens | None:
    """The k most likely tokens of each row; None if k is 0."""
    if not k:
        return None
    values, ids = jax.lax.top_k(logits, k)
    return TopTokens(ids, values - normalizer[..., None])


def empty_top(places: tuple[int, ...], k: int) -> TopTokens | None:
    """Room for the k most likely tokens at each place; None if k is 0."""
    if not k:
        return None
    return TopTokens(jnp.zeros((*places, k), jnp.int32), jnp.zeros((*places, k)))


def describe_choice(
    logits: FullFloat[Array, "B V"], token: Int[Array, " B"], top: int, keep_logits: bool
) -> Chosen:
    """The tokens of one step, [B, 1], with their log-probabilities.

    Args:
        logits: Logits of the model for these tokens.
        top: k of `TopTokens`; 0 for none.
        keep_logits: Whether to keep the logits.
    """
    chosen = jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0]
    normalizer = jax.nn.logsumexp(logits, axis=1)
    step = Chosen(
        tokens=token,
        log_probabilities=chosen - normalizer,
        top=top_tokens(logits, normalizer, top),
        logits=logits if keep_logits else None,
    )
    return jax.tree.map(lambda a: a[:, None], step)
