"""What training minimises: next-token cross entropy of the answer, in the two reductions that are in use."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

from paligemma_jax.model.paligemma import PaliGemma
from paligemma_jax.processing.processor import Inputs


def token_loss(logits: Array, tokens: Array, targets: Array) -> Array:
    """Mean cross entropy of the tokens where `targets` holds (suffix and eos), each predicted from the position before it: a float32 scalar.

    What `answer_loss` equals by default, of whole logits (transformers `ForCausalLMLoss`).

    Args:
      logits: float[B, T, V]; those at t are for the token at t + 1.
      tokens: int[B, T]
      targets: bool[B, T]; a target in the first column has no position before it and is left out.

    A batch without any target gives 0, where transformers gives NaN: one such batch must not destroy a run.
    """
    log_probabilities = jax.nn.log_softmax(logits[:, :-1].astype(jnp.float32))
    losses = -jnp.take_along_axis(log_probabilities, tokens[:, 1:, None], axis=-1)[..., 0]
    return jnp.where(targets[:, 1:], losses, 0).sum() / jnp.maximum(targets[:, 1:].sum(), 1)


def answer_loss(
    model: PaliGemma,
    inputs: Inputs,
    weights: Array,
    max_targets: int,
    features: Array | None = None,
    reduction: Literal["tokens", "examples"] = "tokens",
    smoothing: float = 0.0,
) -> tuple[Array, Array]:
    """The sum of a batch's losses and what to divide it by, so that the parts of a batch add up to the whole: two float32 scalars.

    The decoder's output is turned into logits at target positions only, and there in chunks of the vocabulary: [B, T, V] never exists.

    Args:
      weights: float32[B]; a row of weight 0 does not count.
      max_targets: at least the number of targets of any row; static under jit.
      features: [M, P, W] of the image encoder, where it need not be run; else `inputs.images` are encoded.
      reduction: "tokens", the mean over all targets of the batch (transformers), or "examples", the mean over rows of each row's mean, rows
        without targets counting as 0 (big_vision `train.py`).
      smoothing: the part of each target that is spread over the whole vocabulary.
    """
    seen = model.encode_images(inputs.images) if features is None else model.projector(features.astype(model.config.activation_dtype))
    x = model.hidden(inputs.tokens, None, inputs.valid, inputs.prefix, features=seen)
    targets = inputs.targets.at[:, 0].set(False)  # nothing comes before it
    places = jnp.argsort(~targets, axis=1, stable=True)[:, :max_targets]
    x = jnp.take_along_axis(x, (places - 1)[..., None], axis=1, mode="clip")
    tokens, wanted = (jnp.take_along_axis(a, places, axis=1) for a in (inputs.tokens, targets))
    losses = jnp.where(wanted, -model.decoder.log_probabilities(x, tokens, model.config.profile.capped_prefill, smoothing=smoothing), 0).sum(axis=1)
    counts = wanted.sum(axis=1)
    if reduction == "examples":
        return jnp.sum(weights * losses / jnp.maximum(counts, 1)), jnp.sum(weights)
    return jnp.sum(weights * losses), jnp.sum(weights * counts)
