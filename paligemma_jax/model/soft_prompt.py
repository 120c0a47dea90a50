"""Vectors in front of each row: soft prompts (prompt tuning, arXiv:2104.08691), which are trained,
and other inputs, such as the state of a robot."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from paligemma_jax.model.paligemma import PaliGemma
from paligemma_jax.model.tree import copy_tree

COMMON = 5000  # a vocabulary lists its most common tokens first


def with_soft_prompt(model: PaliGemma, vectors: ArrayLike) -> PaliGemma:
    """Return the model with vectors in place of the embeddings of its soft tokens.

    The inputs have these N tokens, `config.soft_tokens(N)`, in front of each row, with
    `Processor.soft_tokens`. Like image and prompt, they see each other both ways.

    Args:
        vectors: [N, D] for all rows, or [B, N, D] for the rows of a batch of `Inputs`; in the scale
            of the activations: the embedding of a token is its row of the table times sqrt(D).

    Raises:
        ValueError: They do not have the width of the decoder.
    """
    D, shape = model.config.decoder.hidden_size, jnp.shape(vectors)
    if len(shape) not in (2, 3) or shape[-1] != D or 0 in shape:
        raise ValueError(f"a soft prompt must be float[N, {D}] or [B, N, {D}], got {list(shape)}")
    model = copy_tree(model)
    model.soft_prompt = nnx.Param(jnp.asarray(vectors))
    return model


def initial_soft_prompt(model: PaliGemma, count: int, seed: int = 0) -> Float[Array, "N D"]:
    """The embeddings of `count` random common tokens, with which a soft prompt starts, in
    float32."""
    limit = min(COMMON, model.config.decoder.vocab_size)
    ids = jax.random.randint(jax.random.key(seed), (1, count), 0, limit)
    return model.decoder.embedder.encode(ids, jnp.float32)[0]
