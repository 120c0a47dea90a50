"""PaliGemma 1 and 2 (arXiv:2407.07726, arXiv:2412.03555): an image encoder, one linear projector,
and a prefix-LM decoder."""

from __future__ import annotations

from typing import TypeAlias

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Bool, Float, Int

from paligemma_jax.model.cache import KVCache
from paligemma_jax.model.config import PaliGemmaConfig
from paligemma_jax.model.decoder import Decoder
from paligemma_jax.model.layers import FullFloat, Linear, available_dtype
from paligemma_jax.model.masks import TokenSpan, token_span
from paligemma_jax.model.stages import scope, stage
from paligemma_jax.model.vision import VisionEncoder

Tokens: TypeAlias = Int[Array, "B T"]
Flags: TypeAlias = Bool[Array, "B T"]
Images: TypeAlias = Float[Array, "*images S S 3"]
Features: TypeAlias = Float[Array, "*images P D"]


class PaliGemma(nnx.Module):
    """The complete model. A row is image tokens, bos, prompt, newline and answer, with pads on
    either side; all arrays are batch-first.

    The methods share these arguments:
        tokens: int32[B, T] ids. `config.image_token_id` marks the places of image features.
        images: float[M, S, S, 3] in [-1, 1]: the images of the batch in reading order, or None. Or
            [B, n, S, S, 3] where every row has n images, which keeps rows on different devices
            independent.
        features: The result of `encode_images`, [M, P, D] or [B, n, P, D].
        valid: bool[B, T], False on pads.
        prefix: bool[B, T], True on image and prompt, False on the answer.
    """

    def __init__(self, config: PaliGemmaConfig, rngs: nnx.Rngs):
        self.config = config
        D, W = config.decoder.hidden_size, config.vision.hidden_size
        self.vision = VisionEncoder(config.vision, config.attention, rngs)
        self.projector = Linear("DW", (D, W), bias=True, rngs=rngs)
        self.decoder = Decoder(config.decoder, config.profile, config.attention, rngs)
        self.soft_prompt: nnx.Param | None = nnx.data(None)  # see `with_soft_prompt`

    def encode_images(self, images: Images) -> Features:
        """Encode and project images. Only transformers before 5.4 scales the features, by a sqrt(D)
        that it multiplies rounded to their dtype (see `Embedder.encode`)."""
        dtype = available_dtype(self.config.activation_dtype)
        x = self.vision(images.reshape(-1, *images.shape[-3:]).astype(dtype))
        x = stage("projector", self.projector(x.reshape(*images.shape[:-3], *x.shape[1:])))
        if self.config.profile.scaled_features:
            scale = self.config.decoder.hidden_size**0.5
            x = x / scale * jnp.asarray(scale, x.dtype)
        return x

    @scope("decoder")
    def embed(
        self, tokens: Tokens, features: Features | None, is_answer: bool = False
    ) -> Float[Array, "B T D"]:
        """Text embeddings, with image features in place of the image tokens, in reading order, and
        the soft prompt in place of its tokens.

        An image id beyond the table looks up row 0 (transformers `PaliGemmaModel.forward`). Without
        features, image tokens are text. Tokens of an answer are text, too.
        """
        is_image, ids = tokens == self.config.image_token_id, tokens
        if self.config.image_token_id >= self.config.decoder.vocab_size:
            ids = jnp.where(is_image, 0, ids)
        x = self.decoder.embedder.encode(ids, available_dtype(self.config.activation_dtype))
        if features is not None:
            groups = len(tokens) if features.ndim == 4 else 1
            features = features.reshape(groups, -1, features.shape[-1]).astype(x.dtype)
            order = jnp.cumsum(is_image.reshape(groups, -1), axis=1)[..., None] - 1
            placed = jnp.take_along_axis(features, order, axis=1, mode="clip").reshape(x.shape)
            x = jnp.where(is_image[..., None], placed, x)
        if self.soft_prompt is not None and not is_answer:
            rows = self.soft_prompt.shape[:-2]
            if rows not in ((), (len(x),)):
                raise ValueError(
                    f"vectors of {rows[0]} rows need inputs of {rows[0]} rows, got {len(x)}"
                )
            index = (tokens - self.config.soft_tokens(0).start)[..., None]
            vectors = jnp.broadcast_to(
                self.soft_prompt[...], (len(x), *self.soft_prompt.shape[-2:])
            )
            placed = jnp.take_along_axis(vectors, index, axis=1, mode="clip")
            x = jnp.where(index >= 0, placed.astype(x.dtype), x)
        return stage("embeddings", x)

    def hidden(
        self,
        tokens: Tokens,
        images: Images | None,
        valid: Flags,
        prefix: Flags,
        *,
        features: Features | None = None,
        segments: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T D"]:
        """The decoder's normalized output; `decoder.logits` turns chosen positions into logits.

        Args:
            features: Features of the images, which are then not encoded.
            segments: The number of each token's example, from 0, if rows have several examples one
                after the other: each is then computed as in a row of its own.
        """
        if features is None and images is not None:
            features = self.encode_images(images)
        span = token_span(valid, prefix, self.config.profile.first_position, segments)
        return self.decoder(self.embed(tokens, features), span)[0]

    def __call__(
        self,
        tokens: Tokens,
        images: Images | None,
        valid: Flags,
        prefix: Flags,
        segments: Int[Array, "B T"] | None = None,
    ) -> FullFloat[Array, "B T V"]:
        """Teacher-forced logits: those at t predict the token at t + 1. `segments` are those of
        `hidden`."""
        x = self.hidden(tokens, images, valid, prefix, segments=segments)
        return stage("logits", self.decoder.logits(x, self.config.profile.capped_prefill))

    def prefill(
        self, tokens: Tokens, features: Features | None, valid: Flags, prefix: Flags, slots: int
    ) -> tuple[FullFloat[Array, "B V"], KVCache]:
        """Logits for the token after each row's last valid one, and a cache of `slots` slots.

        Takes features, not images, so that an image is encoded once for all of its prompts.
        """
        span = token_span(valid, prefix, self.config.profile.first_position)
        x, k, v = self.decoder(self.embed(tokens, features), span)
        last = jnp.argmax(jnp.where(valid, span.positions, -1), axis=1)
        x = jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]
        logits = stage("logits", self.decoder.logits(x, self.config.profile.capped_prefill))
        return logits, KVCache.from_prefill(k, v, span, slots, self.config.cache)

    def decode_step(
        self, token: Int[Array, " B"], cache: KVCache
    ) -> tuple[FullFloat[Array, "B V"], KVCache]:
        """Append one token to every row. Returns the logits for the next one and the new cache."""
        first = self.config.profile.first_position
        position = cache.span.valid.sum(axis=1, dtype=jnp.int32) + first
        cache = cache.extend(position)
        no = jnp.zeros_like(token, bool)[:, None]
        query = TokenSpan(position[:, None], prefix=no, valid=~no)
        x, k, v = self.decoder(self.embed(token[:, None], None, is_answer=True), query, cache)
        logits = stage("logits", self.decoder.logits(x[:, 0], self.config.profile.capped_decode))
        return logits, cache.write(k, v, after=x)
