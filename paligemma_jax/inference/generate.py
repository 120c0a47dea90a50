"""Ids in, ids out: compiled programs for images, prefill and decoding. No text and no host round trip per token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from paligemma_jax.inference import beam
from paligemma_jax.inference.request import Ends, Generated, Request, make_request
from paligemma_jax.inference.sampling import Beam, BestOf, Greedy, Sampler, Strategy, is_integer
from paligemma_jax.model.cache import KVCache
from paligemma_jax.model.paligemma import PaliGemma
from paligemma_jax.processing.processor import Inputs
from paligemma_jax.sharding.arrays import to_host
from paligemma_jax.sharding.compiled import mesh_jit

CHUNK = 16  # tokens decoded between two looks of the host, where it has to look







@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeState:
    """Where decoding stands between two dispatches."""

    step: Array  # int32: tokens chosen so far
    token: Array  # int32[B]: the last one, not in the cache yet
    log_probability: Array  # float32[B]: its own
    done: Array  # bool[B]: has said eos
    seen: Array | None  # bool[B, V], the ids that a row holds, `<image>` and bos included; None if the sampler does not ask
    cache: KVCache


def generate(
    model: PaliGemma,
    inputs: Inputs,
    max_new_tokens: int,
    *,
    sampler: Strategy = Greedy(),
    seeds: Array | np.ndarray | None = None,
    allowed: Array | np.ndarray | None = None,
    min_new_tokens: int = 0,
    slots: int = 0,
    features: Array | None = None,
    ends: Ends | None = None,
) -> Generated:
    """The answer of every row, at most `max_new_tokens` long.

    inputs: without targets; pads may be on either side.
    seeds: int[B], what a row's random draws depend on beside its prompt; by default 0, 1, 2, ...
    allowed: bool[V] or bool[B, V], False for ids that are never emitted.
    slots: the length of the cache, T + max_new_tokens or more; one program is compiled per B, T and `slots`.
    features: of the images, if they are encoded already.
    ends: where answers end beside eos; asked every `CHUNK` tokens. Not for Beam.
    """
    rows, tokens = inputs.tokens.shape
    slots = slots or tokens + max_new_tokens
    check_lengths(tokens, max_new_tokens, min_new_tokens, slots)
    copies = sampler.width if isinstance(sampler, Beam | BestOf) else 1
    request = make_request(model, rows, seeds, allowed, min_new_tokens, copies)
    features = encode_inputs(model, inputs) if features is None else features
    if isinstance(sampler, Beam):
        return Generated(*beam.search(model, inputs, features, request, max_new_tokens, slots, sampler))
    chooser = sampler.sampler if isinstance(sampler, BestOf) else sampler
    state = prefill(model, inputs, features, request, slots, chooser, copies)
    size = CHUNK if ends else slots - tokens
    tokens, log_probabilities = _fixed(model, decode_chunks(model, state, request, max_new_tokens, size, chooser, ends), max_new_tokens)
    if ends:  # what was decoded past them counts for nothing
        kept = np.arange(max_new_tokens) < ends(tokens)[:, None]
        tokens, log_probabilities = np.where(kept, tokens, model.config.pad_token_id), np.where(kept, log_probabilities, 0)
    scores = log_probabilities.sum(axis=1)
    best = np.arange(rows) * copies + scores.reshape(rows, copies).argmax(axis=1)
    return Generated(tokens[best], log_probabilities[best], scores[best])


def decode_chunks(
    model: PaliGemma, state: DecodeState, request: Request, limit: int, size: int, sampler: Sampler, ends: Ends | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """From a prefill's state the answers piece by piece, tokens int32[B, n] and their log-probabilities: one, then `size` a dispatch."""
    so_far = to_host(state.token)[:, None]
    yield so_far, to_host(state.log_probability)[:, None]
    while so_far.shape[1] < limit:
        if ends:
            state = replace(state, done=state.done | (ends(so_far) <= so_far.shape[1]))
        if to_host(state.done).all():
            return
        tokens, log_probabilities, state = decode(model, state, request, jnp.int32(limit), size, sampler)
        more = min(size, limit - so_far.shape[1])
        tokens, log_probabilities = to_host(tokens)[:, :more], to_host(log_probabilities)[:, :more]
        so_far = np.concatenate([so_far, tokens], axis=1)
        yield tokens, log_probabilities


def _fixed(model: PaliGemma, pieces: Iterator[tuple[np.ndarray, np.ndarray]], length: int) -> tuple[np.ndarray, np.ndarray]:
    """The pieces joined and filled up to `length` tokens."""
    tokens, log_probabilities = (np.concatenate(parts, axis=1) for parts in zip(*pieces))
    rest = [(0, 0), (0, length - tokens.shape[1])]
    return np.pad(tokens, rest, constant_values=model.config.pad_token_id), np.pad(log_probabilities, rest)




def encode_inputs(model: PaliGemma, inputs: Inputs) -> Array | None:
    """Image features [M, P, D], or None if there are no images."""
    return encode_images(model, inputs.images) if len(inputs.images) else None


@mesh_jit
def encode_images(model: PaliGemma, images: Array) -> Array:
    """float32[M, S, S, 3] -> [M, P, D]"""
    return model.encode_images(images)


@partial(mesh_jit, static_argnames=("slots", "sampler", "copies"))
def prefill(model: PaliGemma, inputs: Inputs, features: Array | None, request: Request, slots: int, sampler: Sampler, copies: int = 1) -> DecodeState:
    """The state after the first token of every row; with `copies`, of that many answers to each prompt, one after the other."""
    logits, cache = model.prefill(inputs.tokens, features, inputs.valid, inputs.prefix, slots)
    seen = seen_ids(model, inputs) if sampler.needs_seen else None
    if copies > 1:
        order = jnp.repeat(jnp.arange(len(logits)), copies)
        logits, cache, seen = logits[order], cache.take_rows(order), None if seen is None else seen[order]
    return _choose(model, logits, DecodeState(jnp.int32(0), None, None, jnp.zeros(len(logits), bool), seen, cache), request, sampler)  # type: ignore


@partial(mesh_jit, static_argnames=("size", "sampler"), donate_argnames="state")
def decode(model: PaliGemma, state: DecodeState, request: Request, limit: Array, size: int, sampler: Sampler) -> tuple[Array, Array, DecodeState]:
    """Up to `size` more tokens int32[B, size] and their log-probabilities, until all rows have said eos or hold `limit` tokens.

    The state is donated; it comes back because XLA updates a cache in place only where it is both input and output.
    """
    tokens = jnp.full((len(state.token), size), model.config.pad_token_id, jnp.int32)
    start, log_probabilities = state.step, jnp.zeros(tokens.shape)

    def proceed(loop: tuple) -> Array:
        state, _, _ = loop
        return (state.step < jnp.minimum(limit, start + size)) & ~state.done.all()

    def one(loop: tuple) -> tuple:
        state, tokens, log_probabilities = loop
        logits, cache = model.decode_step(state.token, state.cache)
        state = _choose(model, logits, replace(state, cache=cache), request, sampler)
        at = (0, state.step - 1 - start)
        tokens = jax.lax.dynamic_update_slice(tokens, state.token[:, None], at)
        return state, tokens, jax.lax.dynamic_update_slice(log_probabilities, state.log_probability[:, None], at)

    state, tokens, log_probabilities = jax.lax.while_loop(proceed, one, (state, tokens, log_probabilities))
    return tokens, log_probabilities, state


def _choose(model: PaliGemma, logits: Array, state: DecodeState, request: Request, sampler: Sampler) -> DecodeState:
    """The next token of every row; rows that are done say pad."""
    eos = jnp.array(model.config.eos_token_ids)
    token = sampler(request.mask(logits, state.step, eos), state.seen, request.keys(state.step))
    picked = jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0] - jax.nn.logsumexp(logits, axis=1)
    token, picked = jnp.where(state.done, model.config.pad_token_id, token), jnp.where(state.done, 0, picked)
    seen = state.seen if state.seen is None else state.seen.at[jnp.arange(len(token)), token].set(True)
    return DecodeState(state.step + 1, token, picked, state.done | jnp.isin(token, eos), seen, state.cache)


def seen_ids(model: PaliGemma, inputs: Inputs) -> Array:
    """bool[B, V]: which ids the valid tokens of each row are."""
    rows = jnp.arange(len(inputs.tokens))[:, None]
    return jnp.zeros((len(inputs.tokens), model.config.decoder.vocab_size), bool).at[rows, inputs.tokens].max(inputs.valid)


def check_lengths(tokens: int, max_new_tokens: int, min_new_tokens: int, slots: int) -> None:
    """ValueError for what cannot be asked for."""
    if not is_integer(max_new_tokens) or max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens!r}; ask for at least 1")
    if not is_integer(min_new_tokens) or not 0 <= min_new_tokens <= max_new_tokens:
        raise ValueError(f"min_new_tokens is {min_new_tokens!r}; it can be 0 to max_new_tokens, {max_new_tokens}")
    if tokens + max_new_tokens > slots:
        raise ValueError(f"{tokens} prompt tokens and {max_new_tokens} new ones do not fit a cache of {slots}")
