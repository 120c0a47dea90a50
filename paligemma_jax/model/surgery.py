"""Parts of a model put in place of others: the attention rule, the image encoder."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import nnx

from paligemma_jax.model.config import VisionConfig
from paligemma_jax.model.decoder import Attention
from paligemma_jax.model.layers import Linear
from paligemma_jax.model.masks import MaskRule
from paligemma_jax.model.paligemma import PaliGemma
from paligemma_jax.model.tree import Model, copy_tree, replace_modules


def with_mask(model: Model, rule: MaskRule) -> Model:
    """Return the model with another rule of which query attends to which key, in all layers of the
    decoder, for teacher forcing, prefill and decoding.

    Args:
        model: A PaliGemma, or a model that contains one; layers as a list or stacked.
        rule: (queries, keys, window) -> bool[B, T, S], of two `TokenSpan` and the window of the
            layer, as `masks.prefix_lm_mask`. Attention is then computed in its plain form.

    Raises:
        ValueError: The model has no decoder. When the model runs, if the rule returns another shape
            or dtype.
    """
    count = 0

    def change(path: str, module: nnx.Module) -> nnx.Module | None:
        nonlocal count
        if not isinstance(module, Attention):
            return None
        count += 1
        module = copy_tree(module)
        module.mask_rule = rule
        return module

    model = replace_modules(model, change)
    if not count:
        raise ValueError("with_mask needs a model with a decoder, got one without")
    return model


def with_vision(
    model: PaliGemma, tower: nnx.Module, vision: VisionConfig, rngs: nnx.Rngs
) -> PaliGemma:
    """Return the model with another image encoder, and a new projector of its width.

    Args:
        tower: Any module from images float32[M, S, S, 3] in -1..1 to features [M, P, W].
        vision: Its `image_size` S and `patch_size` give the number of image tokens, P.
        rngs: Initializes the projector.

    Raises:
        ValueError: The tower does not return [M, P, W].
    """
    size, patches = vision.image_size, vision.num_patches
    images = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
    shape = jax.eval_shape(lambda tower, images: tower(images), tower, images).shape
    if len(shape) != 3 or shape[:2] != (2, patches):
        raise ValueError(
            f"the image encoder must return [M, {patches}, W] for images of {size} pixels and "
            f"patches of {vision.patch_size}, got {['M', *shape[1:]] if shape else []}"
        )
    model = copy_tree(model)
    width = model.config.decoder.hidden_size
    model.vision = tower  # type: ignore[assignment]
    model.projector = Linear("DW", (width, shape[2]), bias=True, rngs=rngs)
    model.config = replace(model.config, vision=replace(vision, hidden_size=shape[2]))
    return model
