"""The SigLIP image encoder, without pooling (transformers `SiglipVisionModel`)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float

from paligemma_jax.model.attention import attend
from paligemma_jax.model.config import AttentionForm, VisionConfig
from paligemma_jax.model.constrain import over_all_tokens
from paligemma_jax.model.layers import LayerNorm, Linear
from paligemma_jax.model.stack import scan_layers
from paligemma_jax.model.stages import branch, scope, stage


class Attention(nnx.Module):
    def __init__(self, config: VisionConfig, form: AttentionForm, rngs: nnx.Rngs):
        W, N, H = config.hidden_size, config.num_attention_heads, config.head_dim
        self.scale = H**-0.5
        self.form: AttentionForm = form
        self.q = Linear("NHW", (N, H, W), bias=True, rngs=rngs)
        self.k = Linear("NHW", (N, H, W), bias=True, rngs=rngs)
        self.v = Linear("NHW", (N, H, W), bias=True, rngs=rngs)
        self.o = Linear("WNH", (W, N, H), contracted=2, bias=True, rngs=rngs)

    @over_all_tokens
    def __call__(self, x: Float[Array, "M P W"]) -> Float[Array, "M P W"]:
        q, k, v = (stage(name, getattr(self, name)(x), "detail") for name in "qkv")
        out = attend(q, k, v, scale=self.scale, form=self.form)
        return self.o(stage("heads", out, "detail"))


class MLP(nnx.Module):
    def __init__(self, config: VisionConfig, rngs: nnx.Rngs):
        W, F = config.hidden_size, config.intermediate_size
        self.up = Linear("FW", (F, W), bias=True, rngs=rngs)
        self.down = Linear("WF", (W, F), bias=True, rngs=rngs)

    @over_all_tokens
    def __call__(self, x: Float[Array, "M P W"]) -> Float[Array, "M P W"]:
        activated = jax.nn.gelu(self.up(x), approximate=True)
        return self.down(stage("activations", activated, "detail"))


class Block(nnx.Module):
    def __init__(self, config: VisionConfig, form: AttentionForm, rngs: nnx.Rngs):
        self.pre_attention_norm = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.attention = Attention(config, form, rngs)
        self.pre_mlp_norm = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = MLP(config, rngs)

    def __call__(self, x: Float[Array, "M P W"]) -> Float[Array, "M P W"]:
        x = x + self.attend(x)
        return x + self.feed_forward(x)

    @branch("attention")
    def attend(self, x: Array) -> Array:
        return self.attention(self.pre_attention_norm(x))

    @branch("mlp")
    def feed_forward(self, x: Array) -> Array:
        return self.mlp(self.pre_mlp_norm(x))


class VisionEncoder(nnx.Module):
    """Patches, learned positions, pre-norm blocks with full attention, a final norm."""

    def __init__(self, config: VisionConfig, form: AttentionForm, rngs: nnx.Rngs):
        self.config = config
        W, U = config.hidden_size, config.patch_size**2 * 3
        self.patch = Linear("WU", (W, U), bias=True, rngs=rngs)
        position = jax.random.normal(rngs.params(), (config.num_patches, W)) * W**-0.5
        self.position = nnx.Param(position)
        layers = [Block(config, form, rngs) for _ in range(config.num_hidden_layers)]
        self.layers = nnx.List(layers)
        self.norm = LayerNorm(W, config.layer_norm_eps)

    @scope("vision")
    def __call__(self, images: Float[Array, "M S S 3"]) -> Float[Array, "M P W"]:
        """Encode images in [-1, 1]; the result has their dtype."""
        x = stage("patches", self.patch(patches(images, self.config.patch_size)))
        x = stage("embeddings", x + self.position[...].astype(x.dtype))
        x, _ = scan_layers(lambda block, x: (block(x), None), x, self.layers)
        return stage("output", self.norm(x))


def patches(images: Float[Array, "M S S 3"], size: int) -> Float[Array, "M P U"]:
    """Patches row by row, each with its pixels row by row, channels last."""
    M, S, _, C = images.shape
    n = S // size
    x = images[:, : n * size, : n * size].reshape(M, n, size, n, size, C)
    return jnp.swapaxes(x, 2, 3).reshape(M, n * n, size * size * C)
