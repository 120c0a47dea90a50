"""How the next token is chosen: one frozen dataclass a strategy. The filters are transformers' logits processors (5.23, NUMERICS section 5)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


def is_integer(value: Any) -> bool:
    """Is it an integer, Python's or numpy's, and no bool."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    return is_integer(value) or isinstance(value, float | np.floating)


@dataclass(frozen=True)
class Greedy:
    """The likeliest token; the first of several equally likely ones, as transformers takes it."""

    def __call__(self, logits: Array, seen: Array | None, keys: Array) -> Array:
        """float32[B, V] -> int32[B]"""
        places = jnp.arange(logits.shape[-1], dtype=jnp.int32)  # jnp.argmax, which XLA on a CPU computes ten times as slowly
        return jnp.where(logits == logits.max(axis=-1, keepdims=True), places, places[-1]).min(axis=-1)

    @property
    def needs_seen(self) -> bool:
        return False


@dataclass(frozen=True)
class Sample:
    """A random token from the filtered distribution.

    The filters in the order of transformers: repetition_penalty, temperature, top_k, top_p, min_p; None, and 1.0 for the penalty, is off.
    (transformers' generate() samples with top_k=50 where nothing is set; nothing is set here unless you do.)
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self):
        rules = {
            "temperature": _number(self.temperature) and 1e-6 <= self.temperature < np.inf,  # beyond, float32 logits overflow or vanish
            "top_k": self.top_k is None or (is_integer(self.top_k) and self.top_k >= 1),
            "top_p": self.top_p is None or (_number(self.top_p) and 0 < self.top_p <= 1),
            "min_p": self.min_p is None or (_number(self.min_p) and 0 <= self.min_p <= 1),
            "repetition_penalty": _number(self.repetition_penalty) and 0 < self.repetition_penalty < np.inf,
        }
        for name, holds in rules.items():
            if not holds:
                hint = "; for the likeliest token use Greedy()" if name == "temperature" else ""
                raise ValueError(f"Sample({name}={getattr(self, name)!r}) makes no sense{hint}")

    @property
    def needs_seen(self) -> bool:
        return self.repetition_penalty != 1.0

    def __call__(self, logits: Array, seen: Array | None, keys: Array) -> Array:
        """float32[B, V], the ids that a row holds already bool[B, V], one random key a row -> int32[B]"""
        return jax.vmap(jax.random.categorical)(keys, self.filter(logits, seen)).astype(jnp.int32)

    def filter(self, logits: Array, seen: Array | None) -> Array:
        """float32[B, V] -> the same, -inf where a token is ruled out."""
        if self.repetition_penalty != 1.0:
            penalized = jnp.where(logits < 0, logits * self.repetition_penalty, logits / self.repetition_penalty)
            logits = jnp.where(jnp.asarray(seen), penalized, logits)
        logits = logits / self.temperature
        if self.top_k is not None:  # ties at the k-th place stay
            logits = _keep(logits, logits >= jax.lax.top_k(logits, min(self.top_k, logits.shape[-1]))[0][:, -1:])
        if self.top_p is not None and self.top_p < 1:
            order = jnp.argsort(logits, axis=-1)  # ascending, stable: of tied tokens the later ids stay
            mass = jnp.cumsum(jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1)), axis=-1)
            kept = (mass > 1 - self.top_p).at[:, -1].set(True)
            logits = _keep(logits, jnp.take_along_axis(kept, jnp.argsort(order, axis=-1), axis=-1))
        if self.min_p is not None:
            probabilities = jax.nn.softmax(logits)
            logits = _keep(logits, probabilities >= self.min_p * probabilities.max(axis=-1, keepdims=True))
        return logits


@dataclass(frozen=True)
class Beam:
    """Beam search as transformers 5.23 does it: at each step the best `width` unfinished continuations go on.

    A finished answer scores log-probability / length ** length_penalty. early_stopping: True stops a row at `width` finished answers,
    False when no running one can be better at its present length, "never" when none can at any length.
    """

    width: int = 4
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False

    def __post_init__(self):
        if not is_integer(self.width) or self.width < 1:
            raise ValueError(f"Beam(width={self.width!r}) makes no sense; for the likeliest token use Greedy()")
        if not _number(self.length_penalty) or not np.isfinite(self.length_penalty):
            raise ValueError(f"Beam(length_penalty={self.length_penalty!r}) makes no sense; pass a number, 0 for the plain sum")
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise ValueError(f"Beam(early_stopping={self.early_stopping!r}) makes no sense; pass True, False or 'never'")


@dataclass(frozen=True)
class BestOf:
    """Of `width` samples the one with the highest log-probability under the model."""

    width: int
    sampler: Sample = Sample()

    def __post_init__(self):
        if not is_integer(self.width) or self.width < 1:
            raise ValueError(f"BestOf(width={self.width!r}) makes no sense")
        if not isinstance(self.sampler, Sample):
            raise ValueError(f"BestOf(sampler={self.sampler!r}) makes no sense; it chooses among samples: pass a Sample(...)")


Sampler = Greedy | Sample
Strategy = Sampler | Beam | BestOf


def _keep(logits: Array, kept: Array) -> Array:
    return jnp.where(kept, logits, -jnp.inf)
