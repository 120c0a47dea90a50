"""PaliGemma 1 and 2 (arXiv:2407.07726, arXiv:2412.03555): image encoder, one linear projector, prefix-LM decoder."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jax import Array

from paligemma_jax.model.cache import KVCache
from paligemma_jax.model.config import PaliGemmaConfig
from paligemma_jax.model.decoder import Decoder
from paligemma_jax.model.layers import Einsum, scope, stage
from paligemma_jax.model.masks import Span, span
from paligemma_jax.model.vision import Vision


class PaliGemma(nnx.Module):
    """All arrays are batch-first; one row is image tokens, bos, prompt, newline, answer, with pads on either side.

    The methods share these arguments:
      tokens int32[B, T]: ids; `config.image_token_id` marks the places of image features
      images float[M, S, S, 3] in [-1, 1]: all images of the batch in reading order, or None if there are none; or [B, n, S, S, 3] where every
        row has n, so that rows which lie on different devices need nothing of each other
      valid bool[B, T]: False on pads          prefix bool[B, T]: True on image and prompt, False on the answer
    """

    def __init__(self, config: PaliGemmaConfig, rngs: nnx.Rngs):
        self.config = config
        self.vision = Vision(config.vision, rngs)
        self.projector = Einsum("MPW,DW->MPD", (config.decoder.hidden_size, config.vision.hidden_size), bias=True, rngs=rngs)
        self.decoder = Decoder(config.decoder, config.profile, rngs)

    def encode_images(self, images: Array) -> Array:
        """[M, S, S, 3] -> features [M, P, D], unscaled (no sqrt(D) anywhere: transformers >= 5.4, big_vision); [B, n, ...] -> [B, n, P, D]."""
        with scope("vision"):
            x = self.vision(images.reshape(-1, *images.shape[-3:]).astype(self.config.activation_dtype))
        return stage("projector", self.projector(x.reshape(*images.shape[:-3], *x.shape[1:])))

    def embed(self, tokens: Array, features: Array | None) -> Array:
        """Text embeddings [B, T, D] with image features, [M, P, D] or [B, n, P, D], laid over the image tokens in reading order.

        An image id beyond the table looks up row 0 (transformers `PaliGemmaModel.forward`); without features, image tokens are text.
        """
        image, ids = tokens == self.config.image_token_id, tokens
        if self.config.image_token_id >= self.config.decoder.vocab_size:
            ids = jnp.where(image, 0, ids)
        x = self.decoder.embedder.encode(ids, self.config.activation_dtype)
        if features is not None:
            own = features.reshape(len(tokens) if features.ndim == 4 else 1, -1, features.shape[-1]).astype(x.dtype)
            order = jnp.cumsum(image.reshape(len(own), -1), axis=1)[..., None] - 1
            x = jnp.where(image[..., None], jnp.take_along_axis(own, order, axis=1, mode="clip").reshape(x.shape), x)
        return stage("embeddings", x)

    def hidden(self, tokens: Array, images: Array | None, valid: Array, prefix: Array) -> Array:
        """The decoder's normalised output [B, T, D]: `decoder.logits` of it gives the logits of chosen positions."""
        return self.answer(tokens, None if images is None else self.encode_images(images), valid, prefix)

    def answer(self, tokens: Array, features: Array | None, valid: Array, prefix: Array) -> Array:
        """`hidden` of what `encode_images` made of the images [M, P, D]."""
        with scope("decoder"):
            return self.decoder(self.embed(tokens, features), span(valid, prefix, self.config.profile.first_position))[0]

    def __call__(self, tokens: Array, images: Array | None, valid: Array, prefix: Array) -> Array:
        """Teacher-forced logits float32[B, T, V]: those at t are for the token at t + 1."""
        x = self.hidden(tokens, images, valid, prefix)
        return stage("logits", self.decoder.logits(x, self.config.profile.capped_prefill))

    def prefill(self, tokens: Array, features: Array | None, valid: Array, prefix: Array, slots: int) -> tuple[Array, KVCache]:
        """Logits float32[B, V] for the token after each row's last valid one, and a cache of `slots` slots (>= T).

        features: what `encode_images` made of the images [M, P, D], so that an image is encoded once for all of its prompts.
        """
        queries = span(valid, prefix, self.config.profile.first_position)
        x, k, v = self.decoder(self.embed(tokens, features), queries)
        last = jnp.argmax(jnp.where(valid, queries.positions, -1), axis=1)
        x = jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]
        return self.decoder.logits(x, self.config.profile.capped_prefill), KVCache.of(k, v, queries, slots, self.config.cache)

    def decode_step(self, token: Array, cache: KVCache) -> tuple[Array, KVCache]:
        """One more token int32[B] a row -> logits float32[B, V] for the next, and the cache that holds it."""
        position = cache.span.valid.sum(axis=1, dtype=jnp.int32) + self.config.profile.first_position
        cache = cache.extend(position)
        query = Span(position[:, None], jnp.zeros_like(token, bool)[:, None], jnp.ones_like(token, bool)[:, None])
        x, k, v = self.decoder(self.embed(token[:, None], None), query, cache)
        return self.decoder.logits(x[:, 0], self.config.profile.capped_decode), cache.write(k, v, after=x)
