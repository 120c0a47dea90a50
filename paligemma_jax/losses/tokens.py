"""Losses over next tokens: cross entropy, and distillation from a teacher.

Logits at t predict the token at t + 1. `targets` says which tokens count; a target in the first
column is ignored, since nothing predicts it. A batch without targets gives 0, so that it does not
destroy a run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Float32, Int, Int32

from paligemma_jax.model.layers import FullFloat, full_dtype


def cross_entropy(
    logits: Float[Array, "B T V"],
    tokens: Int[Array, "B T"],
    targets: Bool[Array, "B T"],
    smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> FullFloat[Array, ""]:
    """Mean cross entropy of the target tokens, as transformers' `ForCausalLMLoss`.

    Args:
        smoothing: Probability mass of each target that is spread over the vocabulary (torch's
            `label_smoothing`, arXiv:1512.00567).
        z_loss: Weight of the square of the log of the softmax's denominator, which keeps logits
            from drifting (PaLM, arXiv:2204.02311, section 5: 1e-4).
    """
    logits = logits[:, :-1].astype(full_dtype(logits.dtype))
    normalizer = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
    expected = (1 - smoothing) * chosen + smoothing * logits.mean(axis=-1)
    return _mean(normalizer - expected + z_loss * normalizer**2, targets)


def distillation(
    logits: Float[Array, "B T V"],
    teacher_logits: Float[Array, "B T V"],
    targets: Bool[Array, "B T"],
    temperature: float = 1.0,
    direction: Literal["forward", "reverse"] = "forward",
) -> Float32[Array, ""]:
    """Mean divergence between a teacher's distributions and the student's, at the targets.

    It is multiplied by temperature ** 2, so that gradients keep their size (arXiv:1503.02531).

    Args:
        temperature: Divides both logits.
        direction: "forward" is KL(teacher || student), which covers all that the teacher does;
            "reverse" is KL(student || teacher), which avoids what the teacher does not do
            (MiniLLM, arXiv:2306.08543).
    """
    student, teacher = (
        jax.nn.log_softmax(x[:, :-1].astype(jnp.float32) / temperature)
        for x in (logits, teacher_logits)
    )
    p, q = (teacher, student) if direction == "forward" else (student, teacher)
    divergence = jnp.sum(jnp.exp(p) * (p - q), axis=-1)
    return temperature**2 * _mean(divergence, targets)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TopK:
    """A teacher's k most likely tokens at each position, small enough to store: 257,152 logits of a
    token are 1 MB, 64 of them 512 bytes."""

    tokens: Int32[Array, "B T k"]
    log_probabilities: Float32[Array, "B T k"]

    @classmethod
    def of(cls, logits: Float[Array, "B T V"], k: int, temperature: float = 1.0) -> TopK:
        """Keep the k most likely tokens of the teacher's logits."""
        log_probabilities = jax.nn.log_softmax(logits.astype(jnp.float32) / temperature)
        values, tokens = jax.lax.top_k(log_probabilities, k)
        return cls(tokens, values)


def top_k_distillation(
    logits: Float[Array, "B T V"],
    teacher: TopK,
    targets: Bool[Array, "B T"],
    temperature: float = 1.0,
) -> Float32[Array, ""]:
    """`distillation` (forward) from stored tokens: the others count as one event, whose probability
    is what remains. With k = V it equals `distillation`; below, it is a lower bound."""
    student = jax.nn.log_softmax(logits[:, :-1].astype(jnp.float32) / temperature)
    student = jnp.take_along_axis(student, teacher.tokens[:, :-1], axis=-1)
    p, q = _with_rest(teacher.log_probabilities[:, :-1]), _with_rest(student)
    return temperature**2 * _mean(jnp.sum(jnp.exp(p) * (p - q), axis=-1), targets)


def _with_rest(log_probabilities: Float32[Array, "B T k"]) -> Float32[Array, "B T k1"]:
    """Log-probabilities with one more for all other tokens. It is bounded below, so that rounding
    of a rest near 0 gives no infinite gradient."""
    rest = 1 - jnp.exp(log_probabilities).sum(axis=-1, keepdims=True)
    return jnp.concatenate([log_probabilities, jnp.log(jnp.maximum(rest, 1e-7))], axis=-1)


def _mean(values: FullFloat[Array, "B T1"], targets: Bool[Array, "B T"]) -> FullFloat[Array, ""]:
    counted = targets[:, 1:]
    return jnp.where(counted, values, 0).sum() / jnp.maximum(counted.sum(), 1)
