"""SigLIP image encoder: patches, positions, pre-norm blocks with full attention, a last norm; no pooling (transformers `SiglipVisionModel`)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from paligemma_jax.model.attention import attend
from paligemma_jax.model.config import VisionConfig
from paligemma_jax.model.layers import Einsum, LayerNorm, fold, joined, parted, scope, stage


class Attention(nnx.Module):
    def __init__(self, config: VisionConfig, rngs: nnx.Rngs):
        W, N, H = config.hidden_size, config.num_attention_heads, config.head_dim
        self.scale = H**-0.5
        self.q = Einsum("MPW,NHW->MPNH", (N, H, W), bias=True, rngs=rngs)
        self.k = Einsum("MPW,NHW->MPNH", (N, H, W), bias=True, rngs=rngs)
        self.v = Einsum("MPW,NHW->MPNH", (N, H, W), bias=True, rngs=rngs)
        self.o = Einsum("MPNH,WNH->MPW", (W, N, H), bias=True, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.o(attend(self.q(x), self.k(x), self.v(x), scale=self.scale))


class MLP(nnx.Module):
    def __init__(self, config: VisionConfig, rngs: nnx.Rngs):
        W, F = config.hidden_size, config.intermediate_size
        self.up = Einsum("MPW,FW->MPF", (F, W), bias=True, rngs=rngs)
        self.down = Einsum("MPF,WF->MPW", (W, F), bias=True, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.down(jax.nn.gelu(self.up(x), approximate=True))


class Block(nnx.Module):
    def __init__(self, config: VisionConfig, rngs: nnx.Rngs):
        self.pre_attention_norm = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.attention = Attention(config, rngs)
        self.pre_mlp_norm = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = MLP(config, rngs)

    def __call__(self, x: Array) -> Array:
        with scope("attention"):
            x = x + stage("output", parted(self.attention(joined(self.pre_attention_norm(x)))), branch=True)
        with scope("mlp"):
            return x + stage("output", parted(self.mlp(joined(self.pre_mlp_norm(x)))), branch=True)


class Vision(nnx.Module):
    def __init__(self, config: VisionConfig, rngs: nnx.Rngs):
        self.config = config
        W, U = config.hidden_size, config.patch_size**2 * 3
        self.patch = Einsum("MPU,WU->MPW", (W, U), bias=True, rngs=rngs)
        self.position = nnx.Param(jax.random.normal(rngs.params(), (config.num_patches, W)) * W**-0.5)
        self.layers = nnx.List([Block(config, rngs) for _ in range(config.num_hidden_layers)])
        self.norm = LayerNorm(W, config.layer_norm_eps)

    def __call__(self, images: Array) -> Array:
        """float[M, S, S, 3] in [-1, 1] -> [M, P, W], in the dtype of `images`."""
        x = stage("patches", self.patch(patches(images, self.config.patch_size)))
        x = stage("embeddings", x + self.position[...].astype(x.dtype))
        x, _ = fold(lambda block, x: (block(x), None), x, self.layers)
        return stage("output", self.norm(x))


def patches(images: Array, size: int) -> Array:
    """[M, S, S, 3] -> [M, P, U]: patches row by row, the pixels of each row by row, channels last."""
    M, S, _, C = images.shape
    n = S // size
    x = images[:, : n * size, : n * size].reshape(M, n, size, n, size, C)
    return jnp.swapaxes(x, 2, 3).reshape(M, n * n, size * size * C)
