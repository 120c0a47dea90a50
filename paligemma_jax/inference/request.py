"""The traced options of a generation batch, and its results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Int, Int32, Key, PyTree

from paligemma_jax.grammars.constraint import Constraint
from paligemma_jax.inference.allowed import check_least
from paligemma_jax.inference.chosen import TopTokens
from paligemma_jax.inference.options import DecodingOptions
from paligemma_jax.inference.sampling import is_integer
from paligemma_jax.model.layers import FullFloat
from paligemma_jax.model.paligemma import PaliGemma
from paligemma_jax.processing.processor import AnyArray

# Tokens int32[B, N] so far -> length int[B] of each answer; N + 1 while it continues.
AnswerLengths = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Generated:
    """The answers to the prompts, as tokens.

    There are `num_return` consecutive rows for each prompt, best first.
    """

    tokens: Int32[np.ndarray, "B N"]  # up to and including eos, then pads
    log_probabilities: FullFloat[np.ndarray, "B N"]  # under the model, before any filter; 0 on pads
    scores: FullFloat[np.ndarray, " B"]  # their sum; Beam divides it by length ** length_penalty.
    # A beam search that ended with fewer answers gives the missing ones -inf.
    top: TopTokens | None = None  # [B, N, k], if asked for
    logits: FullFloat[np.ndarray, "B N V"] | None = None  # of the model, if asked for


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Request:
    """The options of a batch. Other values do not compile another program, but for `top` and
    `logits`.

    A row is one answer; BestOf and Beam have several for each prompt.
    """

    seeds: Int[AnyArray, " B"]
    copies: Int[AnyArray, " B"]  # number of the answer among those to its prompt
    allowed: Bool[AnyArray, "*rows V"]  # [V] or [B, V]
    min_new_tokens: Int[AnyArray, "*B"]  # no eos before this many tokens
    max_new_tokens: Int[AnyArray, "*B"]
    grammar: Constraint | None  # of each row
    top: int = field(default=0, metadata=dict(static=True))  # most likely tokens to keep
    logits: bool = field(default=False, metadata=dict(static=True))  # whether to keep the logits

    def mask(
        self,
        logits: FullFloat[Array, "B V"],
        step: Int[Array, "*B"] | int,
        eos: Int[Array, " E"],
        position: PyTree | None,
    ) -> FullFloat[Array, "B V"]:
        """Set the logits of tokens that are not allowed at `step` to -inf.

        Args:
            position: Where the rows are in their grammars.
        """
        is_eos = jnp.isin(jnp.arange(logits.shape[1]), eos)
        too_early = is_eos & jnp.asarray(step < self.min_new_tokens)[..., None]
        allowed = self.allowed & ~too_early
        if self.grammar is not None:
            allowed &= self.grammar.permitted(position, jnp.asarray(self.max_new_tokens - step))
        return jnp.where(allowed, logits, -jnp.inf)

    def begin(self) -> PyTree | None:
        """Where the rows are in their grammars before the first token; None without grammars."""
        return None if self.grammar is None else self.grammar.begin()

    def advance(self, position: PyTree | None, token: Int[Array, " B"]) -> PyTree | None:
        """Where the rows are in their grammars after a token."""
        return position if self.grammar is None else self.grammar.advance(position, token)

    def keys(self, step: Int[Array, "*B"] | int) -> Key[Array, " B"]:
        """One random key per row for the token at `step`."""

        def row_key(seed: Array, copy: Array, step: Array) -> Array:
            key = jax.random.key(seed)
            # The first of several answers equals a single answer.
            key = jnp.where(copy, jax.random.fold_in(key, copy), key)
            return jax.random.fold_in(key, step)

        seeds = jnp.asarray(self.seeds)
        return jax.vmap(row_key)(seeds, self.copies, jnp.broadcast_to(step, seeds.shape))


def make_request(
    model: PaliGemma,
    prompts: int,
    options: DecodingOptions = DecodingOptions(),
    seeds: Int[AnyArray, " B"] | None = None,
) -> Request:
    """Make the request of a batch from host arrays.

    Args:
        prompts: Number of prompts.
        seeds: Random seeds, one per prompt; by default 0, 1, 2, ...

    Raises:
        ValueError: No token is allowed, or more likely tokens are asked for than there are.
    """
    V = model.config.decoder.vocab_size
    check_top(model, options.top_log_probabilities)
    seeds = np.asarray(np.arange(prompts) if seeds is None else seeds, np.int32)
    allowed, grammar = options.allowed, None
    if isinstance(allowed, Constraint):
        allowed, grammar = None, allowed
    if grammar is not None:
        check_least(options.min_new_tokens, grammar, model.config.eos_token_ids)
    if allowed is None:
        allowed = np.ones(V, bool)
    if not isinstance(allowed, np.ndarray):
        raise ValueError(
            "allowed must be compiled to follow it without a processor, "
            f"got {allowed!r}: see inference.allowed.compile_allowed"
        )
    if not allowed.any(axis=-1).all():
        raise ValueError("allowed must permit at least one token")
    check_least(options.min_new_tokens, allowed, model.config.eos_token_ids)
    copies = options.copies
    return Request(
        seeds=np.repeat(seeds, copies),
        copies=np.tile(np.arange(copies, dtype=np.int32), prompts),
        allowed=allowed if allowed.ndim == 1 else np.repeat(allowed, copies, axis=0),
        min_new_tokens=np.asarray(options.min_new_tokens, np.int32),
        max_new_tokens=np.asarray(options.max_new_tokens, np.int32),
        grammar=grammar and grammar.for_rows(np.repeat(np.arange(prompts), copies)),
        top=options.top_log_probabilities,
        logits=options.logits,
    )


def check_top(model: PaliGemma, top: int) -> None:
    """Raise ValueError unless the model has so many tokens to return as the most likely."""
    V = model.config.decoder.vocab_size
    if not is_integer(top) or not 0 <= top <= V:
        raise ValueError(
            f"top_log_probabilities must be at most {V}, the size of the vocabulary, got {top!r}"
        )
