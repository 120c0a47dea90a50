"""The compiled programs of decoding: prefill with the first token, and the loop over the others."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float32, Int, Int32, PyTree

from paligemma_jax.inference.request import Request
from paligemma_jax.inference.sampler import History, Sampler, SamplerContext, choose, init_state
from paligemma_jax.inference.sampling import Greedy, Sample
from paligemma_jax.model.cache import KVCache
from paligemma_jax.model.edits import NO_EDITS, Edits
from paligemma_jax.model.paligemma import Features, PaliGemma
from paligemma_jax.model.stages import editing
from paligemma_jax.processing.processor import Inputs
from paligemma_jax.sharding.compiled import mesh_jit


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeState:
    """The state of decoding between two tokens."""

    step: Int[Array, ""]  # number of tokens chosen so far
    token: Int[Array, " B"]  # the last token, not in the cache yet
    log_probability: Float32[Array, " B"]  # of the last token
    done: Bool[Array, " B"]  # whether a row has produced eos
    history: History | None  # None if the sampler does not read it
    sampler: PyTree  # the state of the sampler
    cache: KVCache
    position: PyTree | None  # where the rows are in their grammars, if they have any


@partial(mesh_jit, static_argnames=("slots", "sampler", "copies"))
def prefill(
    model: PaliGemma,
    inputs: Inputs,
    features: Features | None,
    request: Request,
    slots: int,
    sampler: Sampler,
    copies: int = 1,
    edits: Edits = NO_EDITS,
) -> DecodeState:
    """The state after the first token of every row.

    With `copies`, every prompt has that many consecutive rows.
    """
    with editing(edits):
        logits, cache = model.prefill(inputs.tokens, features, inputs.valid, inputs.prefix, slots)
    tokens, valid = jnp.asarray(inputs.tokens), jnp.asarray(inputs.valid)
    if copies > 1:
        order = jnp.repeat(jnp.arange(len(logits)), copies)
        logits, cache = logits[order], cache.take_rows(order)
        tokens, valid = tokens[order], valid[order]
    rows = len(logits)
    history = History.of_prompts(tokens, valid, slots)
    state = DecodeState(
        step=jnp.int32(0),
        token=jnp.zeros(rows, jnp.int32),
        log_probability=jnp.zeros(rows),
        done=jnp.zeros(rows, bool),
        history=None if type(sampler) in (Greedy, Sample) else history,
        sampler=init_state(sampler, history, logits.shape[1]),
        cache=cache,
        position=request.begin(),
    )
    return _choose(model, logits, state, request, sampler)


@partial(mesh_jit, static_argnames=("size", "sampler"), donate_argnames="state")
def decode(
    model: PaliGemma,
    state: DecodeState,
    request: Request,
    limit: Int[Array, ""],
    size: int,
    sampler: Sampler,
    edits: Edits = NO_EDITS,
) -> tuple[Int32[Array, "B N"], Float32[Array, "B N"], DecodeState]:
    """Decode up to `size` more tokens, until all rows are done or have `limit` tokens.

    Returns:
        Tokens, padded to `size`, their log-probabilities, and the new state. The state is donated
        and returned because XLA updates a cache in place only if it is both input and output.
    """
    start, rows = state.step, len(state.token)
    tokens = jnp.full((rows, size), model.config.pad_token_id, jnp.int32)
    log_probabilities = jnp.zeros(tokens.shape)

    def condition(carry: tuple[DecodeState, Array, Array]) -> Array:
        state = carry[0]
        return (state.step < jnp.minimum(limit, start + size)) & ~state.done.all()

    def step(carry: tuple[DecodeState, Array, Array]) -> tuple[DecodeState, Array, Array]:
        state, tokens, log_probabilities = carry
        with editing(edits):
            logits, cache = model.decode_step(state.token, state.cache)
        state = _choose(model, logits, replace(state, cache=cache), request, sampler)
        place = (0, state.step - 1 - start)
        put = partial(jax.lax.dynamic_update_slice, start_indices=place)
        tokens = put(tokens, state.token[:, None])
        return state, tokens, put(log_probabilities, state.log_probability[:, None])

    carry = (state, tokens, log_probabilities)
    state, tokens, log_probabilities = jax.lax.while_loop(condition, step, carry)
    return tokens, log_probabilities, state


def _choose(
    model: PaliGemma,
    logits: Float32[Array, "B V"],
    state: DecodeState,
    request: Request,
    sampler: Sampler,
) -> DecodeState:
    """Choose the next token of every row; a row that is done gets a pad."""
    eos = jnp.array(model.config.eos_token_ids)
    masked = request.mask(logits, state.step, eos, state.position)
    history = state.history or History.empty(len(logits))
    context = SamplerContext(state.step, request.keys(state.step), history)
    token, sampler_state = choose(sampler, masked, context, state.sampler)
    chosen = jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0]
    log_probability = chosen - jax.nn.logsumexp(logits, axis=1)
    token = jnp.where(state.done, model.config.pad_token_id, token)
    return DecodeState(
        step=state.step + 1,
        token=token,
        log_probability=jnp.where(state.done, 0, log_probability),
        done=state.done | jnp.isin(token, eos),
        history=state.history and state.history.append(token),
        sampler=sampler_state,
        cache=state.cache,
        position=request.advance(state.position, token),
    )
