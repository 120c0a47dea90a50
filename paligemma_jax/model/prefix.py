"""Trained keys and values in front of each row, in every layer: prefix tuning (arXiv:2101.00190).

Soft tokens give them their places: ids, positions, masks and slots of the cache. What a soft token
is embedded as has no influence, since no other token sees more of it than its key and value.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from paligemma_jax.model.masks import TokenSpan
from paligemma_jax.model.paligemma import PaliGemma
from paligemma_jax.model.soft_prompt import initial_soft_prompt
from paligemma_jax.model.tree import copy_tree

PREFIX_PATH = "decoder/layers/attention/prefix"


def with_prefix(model: PaliGemma, prefix: ArrayLike) -> PaliGemma:
    """Return the model with these keys and values in place of those of its soft tokens.

    The inputs have these P tokens, `config.soft_tokens(P)`, in front of each row, with
    `Processor.soft_tokens`.

    Args:
        prefix: [P, L, 2, K, H]: the key, after RoPE, and the value of each token in each layer, in
            the order of peft.

    Raises:
        ValueError: They do not have the shape of the decoder.
    """
    own, shape = model.config.decoder.prefix_shape, jnp.shape(prefix)
    if shape[1:] != own or 0 in shape:
        raise ValueError(
            f"a prefix must be float[P, {', '.join(map(str, own))}], got {list(shape)}"
        )
    model, layers = copy_tree(model), jnp.moveaxis(jnp.asarray(prefix), 0, 2)  # [L, 2, P, K, H]
    if isinstance(model.decoder.layers, nnx.List):
        for block, layer in zip(model.decoder.layers, layers, strict=True):
            block.attention.prefix = nnx.Param(layer)
    else:
        model.decoder.layers.attention.prefix = nnx.Param(layers)
    return model


def prefix_of(model: PaliGemma) -> Float[Array, "P L 2 K H"] | None:
    """The keys and values of `with_prefix`, or None."""
    blocks = model.decoder.layers
    if not isinstance(blocks, nnx.List):
        stacked = blocks.attention.prefix
        return None if stacked is None else jnp.moveaxis(stacked[...], 2, 0)
    layers = [block.attention.prefix[...] for block in blocks if block.attention.prefix is not None]
    return jnp.moveaxis(jnp.stack(layers), 2, 0) if layers else None


def soft_token_count(model: PaliGemma) -> int:
    """The number of soft tokens in front of each row: those of a soft prompt or of a prefix."""
    if model.soft_prompt is not None:
        return model.soft_prompt.shape[-2]
    blocks = model.decoder.layers
    prefix = (blocks[0] if isinstance(blocks, nnx.List) else blocks).attention.prefix
    return 0 if prefix is None else prefix.shape[-3]


def initial_prefix(model: PaliGemma, count: int, seed: int = 0) -> Float[Array, "P L 2 K H"]:
    """The keys and values of `count` random common tokens, with which a prefix starts, in
    float32."""
    x = initial_soft_prompt(model, count, seed)[None].astype(model.config.activation_dtype)
    positions = jnp.arange(count)[None] + model.config.profile.first_position
    yes = jnp.ones((1, count), bool)
    _, *kv = model.decoder(x, TokenSpan(positions, yes, yes))
    k, v = (jnp.asarray(a) for a in kv)  # [L, 1, P, K, H]
    return jnp.stack([k[:, 0], v[:, 0]], 2).swapaxes(0, 1).astype(jnp.float32)
