"""Beam search in one compiled loop, with the sequences and scores of transformers 5.23
(`GenerationMixin._beam_search`)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float32, Int, PyTree

from paligemma_jax.inference.chosen import Chosen, empty_top, top_tokens
from paligemma_jax.inference.request import Generated, Request
from paligemma_jax.inference.sampling import Beam
from paligemma_jax.model.cache import KVCache
from paligemma_jax.model.edits import NO_EDITS, Edits
from paligemma_jax.model.paligemma import Features, PaliGemma
from paligemma_jax.model.stages import editing
from paligemma_jax.processing.processor import Inputs
from paligemma_jax.sharding.arrays import to_host
from paligemma_jax.sharding.compiled import mesh_jit

# Score of an empty slot: finite, so that its sums stay ordered (as in transformers).
EMPTY = -1.0e9


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Beams:
    """R candidate answers to each of B prompts, best first."""

    chosen: Chosen  # [B, R, N]; pads after the end
    scores: Float32[Array, "B R"]

    def best(self, width: int) -> tuple[Beams, Int[Array, "B W"]]:
        """The `width` best candidates and their indices."""
        order = jax.lax.top_k(self.scores, width)[1]
        return take_beams(self, order), order


def take_beams(tree: PyTree, order: Int[Array, "B Q"]) -> PyTree:
    """Rows order[b, 0], order[b, 1], ... of each prompt b, of arrays [B, R, ...]."""

    def take(a: Array) -> Array:
        index = order.reshape(*order.shape, *[1] * (a.ndim - 2))
        return jnp.take_along_axis(a, index, axis=1)

    return jax.tree.map(take, tree)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BeamState:
    """The state of beam search between two tokens."""

    step: Int[Array, ""]  # number of tokens of each running answer
    running: Beams
    finished: Beams
    filled: Bool[Array, "B W"]  # whether a slot of `finished` has an answer
    real: Bool[Array, "B W"]  # whether it is an allowed answer, and no copy from equal beams
    open: Bool[Array, " B"]  # whether a running answer can still beat the finished ones
    logits: Float32[Array, "rows V"]  # [B * W, V]: for the next token of the running answers
    cache: KVCache
    position: PyTree | None  # where the running answers are in their grammars, if they have any


def search(
    model: PaliGemma,
    inputs: Inputs,
    features: Features | None,
    request: Request,
    limit: int,
    slots: int,
    beam: Beam,
    edits: Edits = NO_EDITS,
) -> Generated:
    """Find the best answers to every row, at most `limit` tokens long."""
    size = slots - inputs.tokens.shape[1]
    beams = _search(model, inputs, features, request, jnp.int32(limit), slots, size, beam, edits)

    def returned(a: Array) -> np.ndarray:
        rows = to_host(a)[:, : beam.num_return]
        return rows.reshape(-1, *a.shape[2:])

    chosen = jax.tree.map(lambda a: returned(a)[:, :limit], beams.chosen)
    return Generated(
        chosen.tokens, chosen.log_probabilities, returned(beams.scores), top=chosen.top
    )


@partial(mesh_jit, static_argnames=("slots", "size", "beam"))
def _search(
    model: PaliGemma,
    inputs: Inputs,
    features: Features | None,
    request: Request,
    limit: Int[Array, ""],
    slots: int,
    size: int,
    beam: Beam,
    edits: Edits,
) -> Beams:
    B, W = len(inputs.tokens), beam.width
    with editing(edits):
        logits, cache = model.prefill(inputs.tokens, features, inputs.valid, inputs.prefix, slots)
    order = jnp.repeat(jnp.arange(B), W)
    places = B, W, size
    nothing = Chosen(
        tokens=jnp.full(places, model.config.pad_token_id, jnp.int32),
        log_probabilities=jnp.zeros(places),
        top=empty_top(places, request.top),
    )
    empty = Beams(nothing, scores=jnp.full((B, W), EMPTY))
    # All beams start equal, so only the first one counts.
    first = Beams(nothing, empty.scores.at[:, 0].set(0))
    state = BeamState(
        step=jnp.int32(0),
        running=first,
        finished=empty,
        filled=jnp.zeros((B, W), bool),
        real=jnp.zeros((B, W), bool),
        open=jnp.ones(B, bool),
        logits=logits[order],
        cache=cache.take_rows(order),
        position=request.begin(),
    )

    def condition(state: BeamState) -> Array:
        stopped = state.filled.all() & (beam.early_stopping is True)
        return (state.step < limit) & state.open.any() & ~stopped

    def step(state: BeamState) -> BeamState:
        state, token, parent = _advance(model, state, request, limit, beam)
        rows = (jnp.arange(B)[:, None] * W + parent).reshape(-1)
        position = jax.tree.map(lambda a: a[rows], state.position)
        position = request.advance(position, token.reshape(-1))
        with editing(edits):
            logits, cache = model.decode_step(token.reshape(-1), state.cache.take_rows(rows))
        return replace(state, logits=logits, cache=cache, position=position)

    state = jax.lax.while_loop(condition, step, state)
    return replace(state.finished, scores=jnp.where(state.real, state.finished.scores, -jnp.inf))


def _advance(
    model: PaliGemma, state: BeamState, request: Request, limit: Int[Array, ""], beam: Beam
) -> tuple[BeamState, Int[Array, "B W"], Int[Array, "B W"]]:
    """Extend every running answer by one token.

    Returns:
        The next state, with the old logits and cache; the new token of each running answer; and
        the index of the answer that it continues.
    """
    W, eos = beam.width, jnp.array(model.config.eos_token_ids)
    candidates, parent, token = _continuations(model, state, request, eos, beam)
    ends = jnp.isin(token, eos) | (state.step + 1 >= limit)

    def with_scores(scores: Array) -> Beams:
        return Beams(candidates.chosen, scores)

    running, order = with_scores(candidates.scores + ends * EMPTY).best(W)
    token, parent = (jnp.take_along_axis(a, order, axis=1) for a in (token, parent))

    # Only the best W candidates may end; the others are there to continue in their place.
    ended = ends & (jnp.arange(ends.shape[1]) < W)
    closed = ~state.open | (state.filled.all(axis=1) & (beam.early_stopping is True))
    scores = candidates.scores / (state.step + 1.0) ** beam.length_penalty
    scores = scores + closed[:, None] * EMPTY + ~ended * EMPTY
    finished = jax.tree.map(
        lambda a, b: jnp.concatenate([a, b], axis=1), state.finished, with_scores(scores)
    )
    finished, order = finished.best(W)

    def update(old: Array, new: Array) -> Array:
        return jnp.take_along_axis(jnp.concatenate([old, new], axis=1), order, axis=1)

    filled = update(state.filled, ended)
    real = update(state.real, ended & ~closed[:, None] & (candidates.scores > EMPTY / 2))

    to_limit = beam.early_stopping == "never" and beam.length_penalty > 0
    longest = limit if to_limit else state.step + 1
    attainable = running.scores[:, 0] / longest.astype(jnp.float32) ** beam.length_penalty
    worst = jnp.where(filled, finished.scores.min(axis=1, keepdims=True), EMPTY)
    is_open = state.open & (attainable[:, None] > worst).any(axis=1)
    state = replace(
        state,
        step=state.step + 1,
        running=running,
        finished=finished,
        filled=filled,
        real=real,
        open=is_open,
    )
    return state, token, parent


def _continuations(
    model: PaliGemma, state: BeamState, request: Request, eos: Int[Array, " E"], beam: Beam
) -> tuple[Beams, Int[Array, "B R"], Int[Array, "B R"]]:
    """The best continuations of each prompt's running answers, best first.

    There are more than W, so that W can continue even if the best W end.

    Returns:
        The continuations, the running answer that each continues, and its new token.
    """
    B, W = state.running.scores.shape
    log_probabilities = jax.nn.log_softmax(state.logits)
    masked = request.mask(log_probabilities, state.step, eos, state.position).reshape(B, W, -1)
    totals = masked + state.running.scores[..., None]
    count = max(2, 1 + len(eos)) * W
    scores, index = jax.lax.top_k(totals.reshape(B, -1), count)
    parent, token = index // totals.shape[-1], index % totals.shape[-1]
    log_probability = jnp.take_along_axis(log_probabilities.reshape(B, -1), index, axis=1)
    top = top_tokens(log_probabilities.reshape(B, W, -1), jnp.zeros((B, W)), request.top)
    step = Chosen(token, log_probability, take_beams(top, parent))
    put = partial(jax.lax.dynamic_update_slice_in_dim, start_index=state.step, axis=2)
    continued = take_beams(state.running.chosen, parent)
    chosen = jax.tree.map(lambda a, new: put(a, new[:, :, None]), continued, step)
    return Beams(chosen, scores), parent, token
