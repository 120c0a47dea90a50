"""."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from paligemma_jax.model.paligemma import PaliGemma

Ends = Callable[[np.ndarray], np.ndarray]  # tokens int32[B, N] so far -> how many of each row make its answer int[B]; more than N: it goes on


@dataclass(frozen=True)
class Generated:
    """What B rows were answered."""

    tokens: np.ndarray  # int32[B, N]: up to and with eos, then pads
    log_probabilities: np.ndarray  # float32[B, N]: of each token under the model, before any filter; 0 on pads
    scores: np.ndarray  # float32[B]: their sum; for Beam divided by length ** length_penalty, as transformers' sequences_scores


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Request:
    """What a call asks for; another value compiles nothing."""

    seeds: Array | np.ndarray  # int32[B]
    copies: Array | np.ndarray  # int32[B]: which of several answers to its prompt a row is
    allowed: Array | np.ndarray  # bool[V] or bool[B, V], False for ids that are never emitted
    min_new_tokens: Array | np.int32  # int32: no eos before that many tokens

    def mask(self, logits: Array, step: Array | int, eos: Array) -> Array:
        """float32[B, V] with -inf where the token number `step` may not be."""
        ends = jnp.isin(jnp.arange(logits.shape[1]), eos)
        return jnp.where(self.allowed & ~(ends & (step < self.min_new_tokens)), logits, -jnp.inf)

    def keys(self, step: Array | int) -> Array:
        """One random key a row [B] for the token number `step`."""

        def one(seed: Any, copy: Any) -> Array:
            key = jax.random.key(seed)
            return jax.random.fold_in(jnp.where(copy, jax.random.fold_in(key, copy), key), step)  # the first copy is as if it were alone

        return jax.vmap(one)(self.seeds, self.copies)


def make_request(model: PaliGemma, rows: int, seeds=None, allowed=None, min_new_tokens: int = 0, copies: int = 1) -> Request:
    """A `Request` for `copies` answers to each of `rows` prompts, of arrays of the host; ValueError if nothing is allowed."""
    seeds = np.asarray(np.arange(rows) if seeds is None else seeds, np.int32)
    allowed = np.ones(model.config.decoder.vocab_size, bool) if allowed is None else np.asarray(allowed)
    kept = allowed.copy()
    if min_new_tokens:
        kept[..., list(model.config.eos_token_ids)] = False
    if not kept.any(axis=-1).all():
        raise ValueError("allowed allows no token" + (" but eos, and min_new_tokens forbids that" if allowed.any() else ""))
    allowed = allowed if allowed.ndim == 1 else np.repeat(allowed, copies, axis=0)
    return Request(np.repeat(seeds, copies), np.tile(np.arange(copies, dtype=np.int32), rows), allowed, np.int32(min_new_tokens))
