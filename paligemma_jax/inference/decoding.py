"""The compiled programs of decoding: prefill with the first token, and the loop over the others."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Int, PyTree

from paligemma_jax.inference.chosen import Chosen, describe_choice
from paligemma_jax.inference.request import Request
from paligemma_jax.inference.row_sampling import RowSampler
from paligemma_jax.inference.sampler import History, Sampler, SamplerContext, choose, init_state
from paligemma_jax.inference.sampling import Greedy, Sample
from paligemma_jax.model.cache import KVCache
from paligemma_jax.model.edits import NO_EDITS, Edits
from paligemma_jax.model.layers import FullFloat
from paligemma_jax.model.paligemma import Features, PaliGemma
from paligemma_jax.model.stages import editing
from paligemma_jax.processing.processor import Inputs
from paligemma_jax.sharding.compiled import mesh_jit

WITHOUT_HISTORY = (Greedy, Sample, RowSampler)  # samplers that do not read it


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeState:
    """The state of decoding between two tokens."""

    step: Int[Array, "*B"]  # number of tokens chosen so far, of all rows or of each
    chosen: Chosen  # the last token of each row, [B, 1], not in the cache yet
    done: Bool[Array, " B"]  # whether a row has produced eos
    history: History | None  # None if the sampler does not read it
    sampler: PyTree  # the state of the sampler
    cache: KVCache
    position: PyTree | None  # where the rows are in their grammars, if they have any

    @property
    def token(self) -> Int[Array, " B"]:
        """The last token of each row."""
        return self.chosen.tokens[:, 0]


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
    sampler_state: PyTree | None = None,
) -> DecodeState:
    """The state after the first token of every row.

    Args:
        copies: Number of consecutive rows of every prompt.
        sampler_state: State of the sampler before the first token; by default that of its `init`.
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
        chosen=Chosen(jnp.zeros((rows, 1), jnp.int32), jnp.zeros((rows, 1))),
        done=jnp.zeros(rows, bool),
        history=None if type(sampler) in WITHOUT_HISTORY else history,
        sampler=init_state(sampler, history, logits.shape[1], sampler_state),
        cache=cache,
        position=request.begin(),
    )
    return choose_tokens(model, logits, state, request, sampler)


@partial(mesh_jit, static_argnames=("size", "sampler"), donate_argnames="state")
def decode(
    model: PaliGemma,
    state: DecodeState,
    request: Request,
    limit: Int[Array, ""],
    size: int,
    sampler: Sampler,
    edits: Edits = NO_EDITS,
) -> tuple[Chosen, DecodeState]:
    """Decode up to `size` more tokens, until all rows are done or have `limit` tokens.

    Returns:
        The tokens, padded to `size`, and the new state. The state is donated and returned because
        XLA updates a cache in place only if it is both input and output.
    """
    start, empty = state.step, state.chosen.room(size, model.config.pad_token_id)

    def condition(carry: tuple[DecodeState, Chosen]) -> Array:
        state = carry[0]
        return (state.step < jnp.minimum(limit, start + size)) & ~state.done.all()

    def step(carry: tuple[DecodeState, Chosen]) -> tuple[DecodeState, Chosen]:
        state, chosen = carry
        with editing(edits):
            logits, cache = model.decode_step(state.token, state.cache)
        state = choose_tokens(model, logits, replace(state, cache=cache), request, sampler)
        place = state.step - 1 - start
        put = partial(jax.lax.dynamic_update_slice_in_dim, start_index=place, axis=1)
        return state, jax.tree.map(put, chosen, state.chosen)

    state, chosen = jax.lax.while_loop(condition, step, (state, empty))
    return chosen, state


def choose_tokens(
    model: PaliGemma,
    logits: FullFloat[Array, "B V"],
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
    chosen = describe_choice(logits, token, request.top, request.logits)
    chosen = chosen.where(~state.done[:, None], model.config.pad_token_id)
    token = chosen.tokens[:, 0]
    return DecodeState(
        step=state.step + 1,
        chosen=chosen,
        done=state.done | jnp.isin(token, eos),
        history=state.history and state.history.append(token),
        sampler=sampler_state,
        cache=state.cache,
        position=request.advance(state.position, token),
    )
