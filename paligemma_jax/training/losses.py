"""Training losses: next-token cross entropy of the answer."""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp
from jax import Array

from paligemma_jax.model.paligemma import PaliGemma
from paligemma_jax.processing.processor import Inputs


def answer_loss(
    model: PaliGemma,
    inputs: Inputs,
    weights: Array,
    max_targets: int,
    features: Array | None = None,
    reduction: Literal["tokens", "examples"] = "tokens",
    smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> tuple[Array, Array]:
    """The sum of a batch's losses and its divisor, so that parts of a batch can be added up.

    Logits are computed at target positions only, in chunks of the vocabulary: [B, T, V] never
    exists.

    Args:
        weights: float32[B]; an example of weight 0 does not count.
        max_targets: An upper bound on the number of targets per row; static under jit.
        features: [M, P, W] of the image encoder; by default `inputs.images` are encoded.
        reduction: "tokens" is the mean over all targets of the batch (transformers); "examples" is
            the mean over examples of each one's mean, 0 for an example without targets (big_vision
            `train.py`).
        smoothing: As in `losses.tokens.cross_entropy`, and so is `z_loss`.

    Returns:
        float32[] and float32[]
    """
    x, tokens, mask = target_states(model, inputs, max_targets, features)
    capped = model.config.profile.capped_prefill
    scores, normalizers = model.decoder.scores_and_normalizers(
        x, tokens, capped, smoothing=smoothing
    )
    losses = normalizers - scores + z_loss * normalizers**2
    return reduce_losses(losses, mask, weights, reduction)


def target_states(
    model: PaliGemma, inputs: Inputs, max_targets: int, features: Array | None = None
) -> tuple[Array, Array, Array]:
    """The decoder's output where a target is predicted, the target tokens, and which are targets.

    Arguments are those of `answer_loss`.

    Returns:
        float[B, N, D], int32[B, N] and bool[B, N] for N = `max_targets`; the targets of a row come
        first. `model.decoder.logits(x, model.config.profile.capped_prefill)` are their logits.
    """
    if features is not None:
        features = model.projector(features.astype(model.config.activation_dtype))
    x = model.hidden(inputs.tokens, inputs.images, inputs.valid, inputs.prefix, features=features)
    targets = inputs.targets.at[:, 0].set(False)  # nothing predicts the first token
    indices = jnp.argsort(~targets, axis=1, stable=True)[:, :max_targets]
    x = jnp.take_along_axis(x, (indices - 1)[..., None], axis=1, mode="clip")
    tokens = jnp.take_along_axis(inputs.tokens, indices, axis=1)
    mask = jnp.take_along_axis(targets, indices, axis=1)
    return x, tokens, mask


def reduce_losses(
    losses: Array, mask: Array, weights: Array, reduction: Literal["tokens", "examples"] = "tokens"
) -> tuple[Array, Array]:
    """The sum of the losses of tokens and its divisor; see `answer_loss` for weights and reduction.

    Args:
        losses: float[B, N]
        mask: bool[B, N], the tokens that count.
    """
    total = jnp.where(mask, losses, 0).sum(axis=1)
    counts = mask.sum(axis=1)
    if reduction == "examples":
        return jnp.sum(weights * total / jnp.maximum(counts, 1)), jnp.sum(weights)
    return jnp.sum(weights * total), jnp.sum(weights * counts)
