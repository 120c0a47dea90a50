"""Beam search inside one compiled loop, with the sequences and scores of transformers 5.23 (`GenerationMixin._beam_search`)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from paligemma_jax.inference.sampling import Beam
from paligemma_jax.model.cache import KVCache
from paligemma_jax.model.paligemma import PaliGemma
from paligemma_jax.processing.processor import Inputs
from paligemma_jax.sharding.arrays import to_host
from paligemma_jax.sharding.compiled import mesh_jit

if TYPE_CHECKING:
    from paligemma_jax.inference.request import Request

NEVER = -1.0e9  # the score of what is not there: finite, so that sums of it stay ordered (transformers uses the same)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Beams:
    """R candidate answers to each of B prompts, best first."""

    tokens: Array  # int32[B, R, N], pads beyond their end
    log_probabilities: Array  # float32[B, R, N], of each token
    scores: Array  # float32[B, R]

    def pick(self, order: Array) -> Beams:
        """Candidates order[B, Q] of each row."""
        return jax.tree.map(lambda a: jnp.take_along_axis(a, order.reshape(*order.shape, *[1] * (a.ndim - 2)), axis=1), self)

    def best(self, width: int) -> tuple[Beams, Array]:
        """The `width` best, and which they were int32[B, width]."""
        order = jax.lax.top_k(self.scores, width)[1]
        return self.pick(order), order


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BeamState:
    step: Array  # int32: tokens per running answer
    running: Beams
    finished: Beams
    full: Array  # bool[B, W]: is finished[b, w] an answer, or still empty
    open: Array  # bool[B]: may a running answer still become better than the finished ones
    logits: Array  # float32[B * W, V]: for the next token of the running ones
    cache: KVCache


def search(
    model: PaliGemma, inputs: Inputs, features: Array | None, request: Request, limit: int, slots: int, beam: Beam
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens int32[B, limit], their log-probabilities, and scores float32[B] of the best answer to every row."""
    size = slots - inputs.tokens.shape[1]
    best = _search(model, inputs, features, request, jnp.int32(limit), slots, size, beam)
    return to_host(best.tokens)[:, 0, :limit], to_host(best.log_probabilities)[:, 0, :limit], to_host(best.scores)[:, 0]


@partial(mesh_jit, static_argnames=("slots", "size", "beam"))
def _search(model: PaliGemma, inputs: Inputs, features: Array | None, request: Request, limit: Array, slots: int, size: int, beam: Beam) -> Beams:
    B, W = len(inputs.tokens), beam.width
    logits, cache = model.prefill(inputs.tokens, features, inputs.valid, inputs.prefix, slots)
    order = jnp.repeat(jnp.arange(B), W)
    empty = Beams(jnp.full((B, W, size), model.config.pad_token_id, jnp.int32), jnp.zeros((B, W, size)), jnp.full((B, W), NEVER))
    first = Beams(empty.tokens, empty.log_probabilities, empty.scores.at[:, 0].set(0))  # all beams are alike yet: one counts
    no = jnp.zeros((B, W), bool)
    state = BeamState(jnp.int32(0), first, empty, no, jnp.ones(B, bool), logits[order], cache.take_rows(order))

    def proceed(state: BeamState) -> Array:
        some_open = state.open.any() & ~(state.full.all() & (beam.early_stopping is True))
        return (state.step < limit) & some_open

    def one(state: BeamState) -> BeamState:
        state, token, parent = _advance(model, state, request, limit, beam)
        cache = state.cache.take_rows((jnp.arange(B)[:, None] * W + parent).reshape(-1))
        logits, cache = model.decode_step(token.reshape(-1), cache)
        return BeamState(state.step, state.running, state.finished, state.full, state.open, logits, cache)

    return jax.lax.while_loop(proceed, one, state).finished


def _advance(model: PaliGemma, state: BeamState, request: Request, limit: Array, beam: Beam) -> tuple[BeamState, Array, Array]:
    """One token more: the state but for logits and cache, the token int32[B, W] of every running answer and the one it continues."""
    W, eos = beam.width, jnp.array(model.config.eos_token_ids)
    candidates, parent, token = _continuations(model, state, request, eos, beam)
    ends = jnp.isin(token, eos) | (state.step + 1 >= limit)

    running = Beams(candidates.tokens, candidates.log_probabilities, candidates.scores + ends * NEVER)
    running, order = running.best(W)
    token, parent = jnp.take_along_axis(token, order, axis=1), jnp.take_along_axis(parent, order, axis=1)

    ended = ends & (jnp.arange(ends.shape[1]) < W)  # only the best W may end; the others stand by to go on
    closed = ~state.open | (state.full.all(axis=1) & (beam.early_stopping is True))
    scores = candidates.scores / (state.step + 1.0) ** beam.length_penalty + closed[:, None] * NEVER + ~ended * NEVER
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), state.finished, Beams(candidates.tokens, candidates.log_probabilities, scores))
    finished, order = both.best(W)
    full = jnp.take_along_axis(jnp.concatenate([state.full, ended], axis=1), order, axis=1)

    longest = limit if beam.early_stopping == "never" and beam.length_penalty > 0 else state.step + 1
    hope = running.scores[:, 0] / longest.astype(jnp.float32) ** beam.length_penalty
    worst = jnp.where(full, finished.scores.min(axis=1, keepdims=True), NEVER)
    still = state.open & (hope[:, None] > worst).any(axis=1)
    return BeamState(state.step + 1, running, finished, full, still, state.logits, state.cache), token, parent


def _continuations(model: PaliGemma, state: BeamState, request: Request, eos: Array, beam: Beam) -> tuple[Beams, Array, Array]:
    """The best continuations of each row, more than W so that W go on even if the best W end; what they continue, and with which token."""
    B, W = state.running.scores.shape
    plain = jax.nn.log_softmax(state.logits)
    total = request.mask(plain, state.step, eos).reshape(B, W, -1) + state.running.scores[..., None]
    scores, index = jax.lax.top_k(total.reshape(B, -1), max(2, 1 + len(eos)) * W)
    parent, token = index // total.shape[-1], index % total.shape[-1]
    continued = state.running.pick(parent)
    own = jnp.take_along_axis(plain.reshape(B, -1), index, axis=1)
    at = (0, 0, state.step)
    tokens = jax.lax.dynamic_update_slice(continued.tokens, token[..., None], at)
    return Beams(tokens, jax.lax.dynamic_update_slice(continued.log_probabilities, own[..., None], at), scores), parent, token
