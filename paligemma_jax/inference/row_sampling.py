"""`Greedy` and `Sample` with the parameters of each row as data, so that rows of one program may
differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float32, Int32

from paligemma_jax.inference.sampler import History, Sampler, SamplerContext
from paligemma_jax.inference.sampling import Greedy, Sample
from paligemma_jax.model.layers import FullFloat
from paligemma_jax.processing.processor import AnyArray


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RowParameters:
    """The parameters of B rows: those of `Sample`, each with a value that disables it."""

    temperature: Float32[AnyArray, " B"]  # 0: greedy
    top_k: Int32[AnyArray, " B"]  # 0: all
    tail: Float32[AnyArray, " B"]  # 1 - top_p; 0: all
    min_p: Float32[AnyArray, " B"]  # 0: all

    @classmethod
    def of(cls, samplers: Sequence[Sampler]) -> RowParameters:
        """The parameters of samplers for which `supports` holds, one per row."""
        rows = [_parameters(sampler) for sampler in samplers]
        temperature, top_k, tail, min_p = (list(column) for column in zip(*rows, strict=True))
        return cls(
            np.array(temperature, np.float32),
            np.array(top_k, np.int32),
            np.array(tail, np.float32),
            np.array(min_p, np.float32),
        )


def supports(sampler: object) -> bool:
    """Whether a sampler is a row's choice of parameters: `Greedy`, or `Sample` without a
    penalty."""
    if type(sampler) is Sample:
        return sampler.repetition_penalty == 1
    return type(sampler) is Greedy


def _parameters(sampler: Sampler) -> tuple[float, int, float, float]:
    if not isinstance(sampler, Sample):
        return 0.0, 0, 0.0, 0.0
    return (
        sampler.temperature,
        sampler.top_k or 0,
        1 - (1 if sampler.top_p is None else sampler.top_p),
        sampler.min_p or 0.0,
    )


@dataclass(frozen=True)
class RowSampler:
    """Chooses what the `Greedy` or `Sample` of each row chooses. Its state is `RowParameters`."""

    def init(self, history: History, vocabulary: int) -> RowParameters:
        """Every row is greedy; see `decoding.prefill` for others."""
        return RowParameters.of([Greedy()] * len(history.tokens))

    def __call__(
        self, logits: FullFloat[Array, "B V"], context: SamplerContext, state: RowParameters
    ) -> tuple[Int32[Array, " B"], RowParameters]:
        """Choose one token per row. Nothing is drawn or sorted if no row needs it."""
        greedy, _ = Greedy()(logits, context, None)

        def sample() -> Array:
            filtered = _filter(logits, state)
            drawn = jax.vmap(jax.random.categorical)(context.keys, filtered).astype(jnp.int32)
            return jnp.where(state.temperature > 0, drawn, greedy)

        return jax.lax.cond(jnp.any(state.temperature > 0), sample, lambda: greedy), state


def _filter(logits: FullFloat[Array, "B V"], rows: RowParameters) -> FullFloat[Array, "B V"]:
    """`Sample.filter` with the parameters of each row."""
    V = logits.shape[1]
    logits = logits / jnp.where(rows.temperature > 0, rows.temperature, 1)[:, None]

    def keep_top_k(logits: Array) -> Array:
        place = V - jnp.clip(rows.top_k, 1, V)
        worst = jnp.take_along_axis(jnp.sort(logits, axis=1), place[:, None], axis=1)
        return jnp.where((rows.top_k == 0)[:, None] | (logits >= worst), logits, -jnp.inf)

    def keep_top_p(logits: Array) -> Array:
        order = jnp.argsort(logits, axis=1)  # ascending and stable: keeps the later of ties
        ascending = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=1))
        keep = (jnp.cumsum(ascending, axis=1) > rows.tail[:, None]).at[:, -1].set(True)
        keep = jnp.take_along_axis(keep, jnp.argsort(order, axis=1), axis=1)
        return jnp.where((rows.tail == 0)[:, None] | keep, logits, -jnp.inf)

    def keep_min_p(logits: Array) -> Array:
        probabilities = jax.nn.softmax(logits)
        keep = probabilities >= rows.min_p[:, None] * probabilities.max(axis=1, keepdims=True)
        return jnp.where((rows.min_p == 0)[:, None] | keep, logits, -jnp.inf)

    filters = (rows.top_k, keep_top_k), (rows.tail, keep_top_p), (rows.min_p, keep_min_p)
    for parameter, keep in filters:
        logits = jax.lax.cond(jnp.any(parameter > 0), keep, lambda logits: logits, logits)
    return logits
