"""Which parts of the input an answer depends on: saliency, attention rollout."""

from __future__ import annotations

import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Float32

from paligemma_jax.model.edits import NO_EDITS, Edits
from paligemma_jax.model.paligemma import PaliGemma
from paligemma_jax.model.stages import editing
from paligemma_jax.processing.processor import Inputs
from paligemma_jax.sharding.compiled import mesh_jit


@mesh_jit
def saliency(
    model: PaliGemma, inputs: Inputs, edits: Edits = NO_EDITS
) -> Float32[Array, "*images S S"]:
    """The length of the gradient of the answers' log-probability with respect to each pixel
    (arXiv:1312.6034), over its three channels.

    Args:
        inputs: Inputs with images and targets. An image's map is that of its own row.
    """
    tokens, targets = jnp.asarray(inputs.tokens), jnp.asarray(inputs.targets)

    def score(images: Array) -> Array:
        with editing(edits):
            x = model.hidden(tokens, images, inputs.valid, inputs.prefix)
        capped = model.config.profile.capped_prefill
        scores = model.decoder.log_probabilities(x[:, :-1], tokens[:, 1:], capped)
        return jnp.where(targets[:, 1:], scores, 0).sum()

    gradient = jax.grad(score)(jnp.asarray(inputs.images, jnp.float32))
    return jnp.linalg.norm(gradient, axis=-1)


def rollout(
    stages: Mapping[str, Float[Array | np.ndarray, "..."]], tower: str = "decoder"
) -> Float32[np.ndarray, "B T T"]:
    """Attention rollout (Abnar and Zuidema 2020, arXiv:2005.00928): how much of each input token
    reaches each position through all layers, if the residual stream and the mean over heads of the
    attention weights share equally.

    Args:
        stages: Stages with the attention weights of all layers of the tower.
        tower: "decoder" or "vision".

    Raises:
        ValueError: There are none.
    """
    pattern = rf"{tower}/layers/\d+/attention/weights"
    layers = [np.asarray(value) for name, value in stages.items() if re.fullmatch(pattern, name)]
    if not layers:
        raise ValueError(
            f"stages must contain the attention weights of {tower}, got none: collect them with "
            "attention=True"
        )
    identity = np.eye(layers[0].shape[-1], dtype=np.float32)
    total = identity
    for weights in layers:
        total = (weights.mean(axis=1) + identity) / 2 @ total
    return np.broadcast_to(total, (len(layers[0]), *identity.shape))
