"""The compiled programs of continuous batching: rows enter and leave a batch of fixed size.

The cache is a ring. All rows write their next token to the same slot, one further each step, so the
prompt of a new row goes directly before that slot, whatever the other rows have there. The row's
slots are its own until the ring comes round: S slots suffice for a prompt of T tokens, pads
included, and N new ones if S >= T + N. Attention goes by position, never by slot, so a row's tokens
do not depend on where or when it entered.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Int

from paligemma_jax.grammars.rows import begin
from paligemma_jax.inference.chosen import Chosen, describe_choice
from paligemma_jax.inference.decoding import DecodeState, choose_tokens
from paligemma_jax.inference.request import Request
from paligemma_jax.inference.row_sampling import RowParameters, RowSampler
from paligemma_jax.inference.sampling import Greedy
from paligemma_jax.model.paligemma import PaliGemma
from paligemma_jax.processing.processor import AnyArray
from paligemma_jax.sharding.compiled import mesh_jit

SAMPLER = RowSampler()


@partial(mesh_jit, static_argnames=("rows", "slots", "top"))
def empty_state(model: PaliGemma, rows: int, slots: int, top: int) -> DecodeState:
    """A state of `rows` rows that are all done, with `slots` free slots."""
    tokens, flags = jnp.zeros((rows, 1), jnp.int32), jnp.zeros((rows, 1), bool)
    logits, cache = model.prefill(tokens, None, flags, flags, slots)
    return DecodeState(
        step=jnp.zeros(rows, jnp.int32),
        chosen=describe_choice(logits, tokens[:, 0], top, keep_logits=False),
        done=jnp.ones(rows, bool),
        history=None,
        sampler=jax.tree.map(jnp.asarray, RowParameters.of([Greedy()] * rows)),
        cache=cache,
        position=begin(rows),
    )


@partial(mesh_jit, donate_argnames="state")
def insert(
    model: PaliGemma, state: DecodeState, new: DecodeState, rows: Int[AnyArray, " b"]
) -> DecodeState:
    """Put the rows of `new`, a state after prefill, in the places `rows`; those beyond the last are
    left out."""

    def put(old: Array, value: Array) -> Array:
        return old.at[rows].set(value, mode="drop")

    position = begin(len(new.done)) if new.position is None else new.position
    return replace(
        state,
        step=put(state.step, new.step),
        chosen=jax.tree.map(put, state.chosen, new.chosen),
        done=put(state.done, new.done),
        sampler=jax.tree.map(put, state.sampler, new.sampler),
        cache=state.cache.put_rows(new.cache, rows),
        position=jax.tree.map(put, state.position, position),
    )


@partial(mesh_jit, static_argnames="size", donate_argnames="state")
def advance(
    model: PaliGemma,
    state: DecodeState,
    request: Request,
    ended: Bool[AnyArray, " B"],
    enough: Int[AnyArray, ""],
    size: int,
) -> tuple[Chosen, DecodeState]:
    """Decode up to `size` tokens, until at least `enough` rows are done.

    Args:
        request: Its limits are those of each row, [B]. Without a grammar, the rows keep their
            positions.
        ended: Rows that end before the first of these tokens.

    Returns:
        The tokens of each row, padded to `size`, and the new state; `step` counts those of each.
    """
    slots, limit = state.cache.span.valid.shape[1], jnp.asarray(request.max_new_tokens)
    state = replace(state, done=state.done | ended | (state.step >= limit))

    def condition(carry: tuple[Array, DecodeState, Chosen]) -> Array:
        n, state, _ = carry
        return (n < size) & (state.done.sum() < enough)

    def step(carry: tuple[Array, DecodeState, Chosen]) -> tuple[Array, DecodeState, Chosen]:
        n, old, chosen = carry
        cache = replace(old.cache, length=old.cache.length % slots)
        logits, cache = model.decode_step(old.token, cache)
        new = choose_tokens(model, logits, replace(old, cache=cache), request, SAMPLER)
        count = jnp.where(old.done, old.step, new.step)
        new = replace(new, step=count, done=new.done | (count >= limit))
        put = partial(jax.lax.dynamic_update_slice_in_dim, start_index=n, axis=1)
        return n + 1, new, jax.tree.map(put, chosen, new.chosen)

    start = jnp.int32(0), state, state.chosen.room(size, model.config.pad_token_id)
    _, state, chosen = jax.lax.while_loop(condition, step, start)
    return chosen, state
