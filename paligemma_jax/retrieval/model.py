"""ColPali: a PaliGemma whose hidden states are projected to short unit vectors (transformers
`ColPaliForRetrieval`)."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Bool, Float, Float32, Int

from paligemma_jax.model.layers import Linear
from paligemma_jax.model.paligemma import PaliGemma


class ColPali(nnx.Module):
    """Axis E is a vector's length: 128 in the published models."""

    def __init__(self, vlm: PaliGemma, size: int, rngs: nnx.Rngs):
        self.vlm = vlm
        width = vlm.config.decoder.hidden_size
        self.projection = Linear("ED", (size, width), bias=True, rngs=rngs)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        images: Float[Array, "M S S 3"] | None,
        valid: Bool[Array, "B T"],
    ) -> Float32[Array, "B T E"]:
        """One unit vector for each token, zero on pads. All tokens attend to each other, in queries
        too."""
        x = self.vlm.hidden(tokens, images, valid, valid)
        vectors = self.projection(x).astype(jnp.float32)
        vectors /= jnp.linalg.norm(vectors, axis=-1, keepdims=True)
        return jnp.where(valid[..., None], vectors, 0)
