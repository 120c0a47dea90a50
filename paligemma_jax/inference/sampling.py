"""How the next token is chosen: one frozen dataclass per strategy.

The filters are the logits processors of transformers 5.23.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Int32

from paligemma_jax.inference.sampler import History, Sampler, SamplerContext, is_sampler
from paligemma_jax.model.layers import FullFloat


def is_integer(value: object) -> bool:
    """Whether a value is an integer of Python or numpy, and not a bool."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return is_integer(value) or isinstance(value, float | np.floating)


def _require(condition: bool | np.bool_, owner: object, field: str, requirement: str) -> None:
    if not condition:
        name, value = f"{type(owner).__name__}.{field}", getattr(owner, field)
        raise ValueError(f"{name} must be {requirement}, got {value!r}")


def _check_width(strategy: Beam | BestOf) -> None:
    width, returned = strategy.width, strategy.num_return
    _require(is_integer(width) and width >= 1, strategy, "width", "a positive integer")
    returned_valid = is_integer(returned) and 1 <= returned <= width
    requirement = f"an integer from 1 to width ({width})"
    _require(returned_valid, strategy, "num_return", requirement)


@dataclass(frozen=True)
class Greedy:
    """The most likely token; ties go to the lowest id, as in transformers."""

    def init(self, history: History, vocabulary: int) -> None:
        """There is no state."""

    def __call__(
        self, logits: FullFloat[Array, "B V"], context: SamplerContext, state: None
    ) -> tuple[Int32[Array, " B"], None]:
        """Choose one token per row; context and state are not used."""
        ids = jnp.arange(logits.shape[-1], dtype=jnp.int32)
        is_best = logits == logits.max(axis=-1, keepdims=True)
        best = jnp.where(is_best, ids, ids[-1]).min(axis=-1)  # argmax is 10 times slower on a CPU
        return best, None


@dataclass(frozen=True)
class Sample:
    """A random token from the filtered distribution.

    The filters are applied in the order of transformers: repetition_penalty, temperature, top_k,
    top_p, min_p. None disables a filter, and so does a penalty of 1. (transformers samples with
    top_k=50 by default; here nothing is filtered by default.)

    Args:
        temperature: Divides the logits.
        top_k: Keep only the k most likely tokens.
        top_p: Keep only the most likely tokens that together have this probability.
        min_p: Keep only tokens at least this fraction as likely as the most likely one.
        repetition_penalty: Divides the positive logits, and multiplies the negative ones, of
            tokens that the prompt or the answer already contains.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self):
        # Beyond these temperatures, float32 logits overflow or vanish.
        temperature_valid = _is_number(self.temperature) and 1e-6 <= self.temperature < np.inf
        hint = "a finite number of at least 1e-6 (use Greedy() for the most likely token)"
        _require(temperature_valid, self, "temperature", hint)
        top_k_valid = self.top_k is None or (is_integer(self.top_k) and self.top_k >= 1)
        _require(top_k_valid, self, "top_k", "a positive integer or None")
        top_p_valid = self.top_p is None or (_is_number(self.top_p) and 0 < self.top_p <= 1)
        _require(top_p_valid, self, "top_p", "a number above 0 and at most 1, or None")
        min_p_valid = self.min_p is None or (_is_number(self.min_p) and 0 <= self.min_p <= 1)
        _require(min_p_valid, self, "min_p", "a number from 0 to 1, or None")
        penalty = self.repetition_penalty
        penalty_valid = _is_number(penalty) and 0 < penalty < np.inf
        _require(penalty_valid, self, "repetition_penalty", "a positive finite number")

    def init(self, history: History, vocabulary: int) -> Bool[Array, "B V"] | None:
        """Return which ids a row contains, `<image>` and bos included; None without a penalty."""
        if self.repetition_penalty == 1.0:
            return None
        nothing = jnp.zeros((len(history.tokens), vocabulary), bool)
        rows = jnp.arange(len(nothing))[:, None]
        return nothing.at[rows, history.tokens].max(history.valid)

    def __call__(
        self,
        logits: FullFloat[Array, "B V"],
        context: SamplerContext,
        state: Bool[Array, "B V"] | None,
    ) -> tuple[Int32[Array, " B"], Bool[Array, "B V"] | None]:
        """Draw one token per row."""
        filtered = self.filter(logits, state)
        tokens = jax.vmap(jax.random.categorical)(context.keys, filtered).astype(jnp.int32)
        if state is not None:
            state = state.at[jnp.arange(len(tokens)), tokens].set(True)
        return tokens, state

    def filter(
        self, logits: FullFloat[Array, "B V"], seen: Bool[Array, "B V"] | None
    ) -> FullFloat[Array, "B V"]:
        """Scale the logits, and set those of excluded tokens to -inf.

        Args:
            seen: Whether a row already contains a token; None without a penalty.
        """
        if seen is not None:
            penalty = self.repetition_penalty
            penalized = jnp.where(logits < 0, logits * penalty, logits / penalty)
            logits = jnp.where(seen, penalized, logits)
        logits = logits / self.temperature
        if self.top_k is not None:  # keeps all tokens that tie for the k-th place
            best = jax.lax.top_k(logits, min(self.top_k, logits.shape[-1]))[0]
            logits = jnp.where(logits >= best[:, -1:], logits, -jnp.inf)
        if self.top_p is not None and self.top_p < 1:
            order = jnp.argsort(logits, axis=-1)  # ascending and stable: keeps the later of ties
            ascending = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1))
            keep = (jnp.cumsum(ascending, axis=-1) > 1 - self.top_p).at[:, -1].set(True)
            keep = jnp.take_along_axis(keep, jnp.argsort(order, axis=-1), axis=-1)
            logits = jnp.where(keep, logits, -jnp.inf)
        if self.min_p is not None:
            probabilities = jax.nn.softmax(logits)
            keep = probabilities >= self.min_p * probabilities.max(axis=-1, keepdims=True)
            logits = jnp.where(keep, logits, -jnp.inf)
        return logits


@dataclass(frozen=True)
class Beam:
    """Beam search as in transformers 5.23: each step continues the best `width` unfinished answers.

    Args:
        width: Number of beams.
        length_penalty: A finished answer scores log-probability / length ** length_penalty.
        early_stopping: When a row stops. True: at `width` finished answers. False: when no
            unfinished answer can score better at its current length. "never": when none can at
            any length.
        num_return: Number of answers to return, best first.
    """

    width: int = 4
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    num_return: int = 1

    def __post_init__(self):
        _check_width(self)
        penalty_valid = _is_number(self.length_penalty) and np.isfinite(self.length_penalty)
        _require(penalty_valid, self, "length_penalty", "a finite number")
        early = self.early_stopping
        early_valid = isinstance(early, bool) or early == "never"
        _require(early_valid, self, "early_stopping", "True, False or 'never'")


@dataclass(frozen=True)
class BestOf:
    """The sample with the highest log-probability under the model, out of `width` samples.

    Args:
        width: Number of samples.
        sampler: Draws them.
        num_return: Number of samples to return, best first.
    """

    width: int
    sampler: Sampler = Sample()
    num_return: int = 1

    def __post_init__(self):
        _check_width(self)
        draws = is_sampler(self.sampler) and not isinstance(self.sampler, Greedy)
        _require(draws, self, "sampler", "Sample(...) or a sampler of your own")


Strategy = Sampler | Beam | BestOf
