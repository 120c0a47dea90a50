"""The loss of GRPO (arXiv:2402.03300, equation 3) and its advantages, from rewards of sampled
answers.

Axes: B prompts, G answers to each, R = B G answers, N tokens of an answer.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Float32


def group_advantages(
    rewards: Float[np.ndarray, "B G"], std: bool = True
) -> Float32[np.ndarray, "B G"]:
    """How much better each answer is than the mean of its group.

    Args:
        std: Divide by the group's standard deviation, as in the paper. Without, groups whose
            answers differ little count little (Dr. GRPO, arXiv:2503.20783).
    """
    centered = rewards - rewards.mean(axis=1, keepdims=True)
    if std:
        centered /= rewards.std(axis=1, ddof=1, keepdims=True) + 1e-4  # as in trl
    return centered.astype(np.float32)


def grpo(
    log_probabilities: Float32[Array, "R N"],
    old_log_probabilities: Float32[Array, "R N"],
    reference_log_probabilities: Float32[Array, "R N"] | None,
    advantages: Float32[Array, " R"],
    mask: Bool[Array, "R N"],
    clip: float = 0.2,
    kl: float = 0.04,
) -> tuple[Float32[Array, ""], dict[str, Float32[Array, ""]]]:
    """The mean over answers of the mean over each one's tokens.

    Args:
        log_probabilities: Of the sampled tokens under the model.
        old_log_probabilities: Under the model that sampled them, without gradient.
        reference_log_probabilities: Under the frozen reference; None for no divergence from it.
        advantages: As of `group_advantages`, of each answer.
        mask: Which tokens belong to an answer, its end included.
        clip: Clip the ratio of new to old probabilities to 1 plus or minus this.
        kl: Weight of the divergence from the reference.

    Returns:
        The loss, and its "policy" and "kl" parts; "kl" is not weighted.
    """
    log_ratio = jnp.where(mask, log_probabilities - old_log_probabilities, 0)
    ratio, gain = jnp.exp(log_ratio), advantages[:, None]
    policy = -jnp.minimum(ratio * gain, jnp.clip(ratio, 1 - clip, 1 + clip) * gain)
    divergence = jnp.zeros_like(policy)
    if reference_log_probabilities is not None:
        # Unbiased and never negative (http://joschu.net/blog/kl-approx.html, k3).
        difference = jnp.where(mask, reference_log_probabilities - log_probabilities, 0)
        divergence = jnp.exp(difference) - difference - 1

    def mean(values: Array) -> Array:
        counts = jnp.maximum(mask.sum(axis=1), 1)
        return jnp.mean(jnp.where(mask, values, 0).sum(axis=1) / counts)

    parts = {"policy": mean(policy), "kl": mean(divergence)}
    return parts["policy"] + kl * parts["kl"], parts
