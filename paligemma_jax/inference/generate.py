"""Ids in, ids out: a compiled prefill, a compiled decode loop, a compiled score. No text and no host round trip per token."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from paligemma_jax.inference.sampling import Greedy, Sampler
from paligemma_jax.model.cache import KVCache
from paligemma_jax.model.layers import collect
from paligemma_jax.model.paligemma import PaliGemma
from paligemma_jax.processing.processor import Inputs


def generate(
    model: PaliGemma,
    inputs: Inputs,
    max_new_tokens: int,
    *,
    sampler: Sampler = Greedy(),
    seeds: Array | np.ndarray | None = None,
    allowed: Array | np.ndarray | None = None,
    slots: int | None = None,
) -> np.ndarray:
    """int32[B, max_new_tokens]: the answer of every row up to and with its eos, then pads.

    inputs: without targets; pads may be on either side.
    seeds: int[B], what a row's random draws depend on beside its prompt; by default 0, 1, 2, ...
    allowed: bool[V], False for ids that are never emitted.
    slots: the length of the cache, at least T + max_new_tokens; one program is compiled per T and `slots`.
    """
    rows, tokens = inputs.tokens.shape
    slots = tokens + max_new_tokens if slots is None else slots
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; ask for at least 1")
    if tokens + max_new_tokens > slots:
        raise ValueError(f"{tokens} prompt tokens and {max_new_tokens} new ones do not fit a cache of {slots}")
    seeds = np.arange(rows) if seeds is None else seeds
    allowed = np.ones(model.config.decoder.vocab_size, bool) if allowed is None else allowed
    logits, cache = prefill(model, inputs, slots)
    choice = Choice(jax.vmap(jax.random.key)(jnp.asarray(seeds)), jnp.asarray(allowed), seen_ids(model, inputs) if sampler.needs_seen else None)
    out, _ = decode(model, logits, cache, choice, jnp.int32(max_new_tokens), slots - tokens, sampler)
    return np.asarray(out)[:, :max_new_tokens]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Choice:
    """What a row's next token depends on beside its logits."""

    keys: Array  # one random key a row [B]
    allowed: Array  # bool[V]
    seen: Array | None  # bool[B, V], the ids that a row holds, `<image>` and bos included; None if the sampler does not ask

    def __call__(self, sampler: Sampler, logits: Array, step: Array | int) -> Array:
        keys = jax.vmap(jax.random.fold_in, (0, None))(self.keys, step)
        return sampler(jnp.where(self.allowed, logits, -jnp.inf), self.seen, keys)

    def with_token(self, token: Array) -> Choice:
        return self if self.seen is None else replace(self, seen=self.seen.at[jnp.arange(len(token)), token].set(True))


def seen_ids(model: PaliGemma, inputs: Inputs) -> Array:
    """bool[B, V]: which ids the valid tokens of each row are."""
    rows = jnp.arange(len(inputs.tokens))[:, None]
    return jnp.zeros((len(inputs.tokens), model.config.decoder.vocab_size), bool).at[rows, inputs.tokens].max(inputs.valid)


@partial(jax.jit, static_argnames="slots")
def prefill(model: PaliGemma, inputs: Inputs, slots: int) -> tuple[Array, KVCache]:
    """Logits float32[B, V] of each row's last position, and the cache."""
    return model.prefill(inputs.tokens, _images(inputs), inputs.valid, inputs.prefix, slots)


@partial(jax.jit, static_argnames=("size", "sampler"), donate_argnames="cache")
def decode(model: PaliGemma, logits: Array, cache: KVCache, choice: Choice, limit: Array, size: int, sampler: Sampler) -> tuple[Array, KVCache]:
    """int32[B, size] from a prefill's logits and cache: stops when every row has said eos, or after `limit` tokens.

    The cache is donated; it comes back because XLA updates in place only what is both input and output.
    """
    pad, eos = model.config.pad_token_id, jnp.array(model.config.eos_token_ids)

    def choose(step: Array | int, logits: Array, done: Array, choice: Choice) -> tuple[Array, Array, Choice]:
        token = jnp.where(done, pad, choice(sampler, logits, step))
        return token, done | jnp.isin(token, eos), choice.with_token(token)

    def proceed(state: tuple) -> Array:
        step, _, _, done, _, _ = state
        return (step < limit) & ~done.all()

    def one(state: tuple) -> tuple:
        step, out, token, done, choice, cache = state
        logits, cache = model.decode_step(token, cache)
        token, done, choice = choose(step, logits, done, choice)
        return step + 1, out.at[:, step].set(token), token, done, choice, cache

    token, done, choice = choose(0, logits, jnp.zeros(len(logits), bool), choice)
    out = jnp.full((len(logits), size), pad, jnp.int32).at[:, 0].set(token)
    _, out, _, _, _, cache = jax.lax.while_loop(proceed, one, (jnp.int32(1), out, token, done, choice, cache))
    return out, cache


@jax.jit
def forward(model: PaliGemma, inputs: Inputs) -> Array:
    """Teacher-forced logits float32[B, T, V]."""
    return model(inputs.tokens, _images(inputs), inputs.valid, inputs.prefix)


@partial(jax.jit, static_argnames="attention")
def stages(model: PaliGemma, inputs: Inputs, attention: bool = False) -> dict[str, Array]:
    """Every stage's output of a teacher-forced pass, in order of computation."""
    with collect(attention) as found:
        model(inputs.tokens, _images(inputs), inputs.valid, inputs.prefix)
    return found


def score(model: PaliGemma, inputs: Inputs) -> np.ndarray:
    """float32[B]: the log-probability of each row's targets (suffix and eos), in the profile's teacher-forced logits."""
    longest = int(inputs.targets.sum(axis=1).max())
    return np.asarray(_score(model, inputs, longest))


@partial(jax.jit, static_argnames="longest")
def _score(model: PaliGemma, inputs: Inputs, longest: int) -> Array:
    x = model.hidden(inputs.tokens, _images(inputs), inputs.valid, inputs.prefix)
    places = jnp.argsort(~inputs.targets, axis=1, stable=True)[:, :longest]  # only there are logits made: [B, T, V] would be huge
    x = jnp.take_along_axis(x, (places - 1)[..., None], axis=1)
    log_probabilities = jax.nn.log_softmax(model.decoder.logits(x, model.config.profile.capped_prefill))
    tokens = jnp.take_along_axis(jnp.asarray(inputs.tokens), places, axis=1)
    picked = jnp.take_along_axis(log_probabilities, tokens[..., None], axis=2)[..., 0]
    return jnp.where(jnp.take_along_axis(jnp.asarray(inputs.targets), places, axis=1), picked, 0).sum(axis=1)


def _images(inputs: Inputs) -> Array | None:
    return jnp.asarray(inputs.images) if len(inputs.images) else None
