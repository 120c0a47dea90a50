"""Initial parameters of `tiny`: random, except where structure is known.

Training from scratch would spend hundreds of steps discovering it.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from paligemma_jax.model.config import PaliGemmaConfig
from paligemma_jax.model.paligemma import PaliGemma
from paligemma_jax.model.tree import parameters, with_parameters
from paligemma_jax.processing.tokenizer import Tokenizer


def initialize(config: PaliGemmaConfig, tokenizer: Tokenizer, codebook: np.ndarray) -> PaliGemma:
    """Return a new model.

    Args:
        tokenizer: Provides the ids of the `<loc>` and `<seg>` tokens.
        codebook: float32[128, E] of the mask codec.
    """
    model = PaliGemma(config, nnx.Rngs(0))
    values = dict(parameters(model))
    table = values["decoder/embedder/table"]
    width = table.shape[1]
    known = {tokenizer.loc(0): waves(1024, width), tokenizer.seg(0): spread(codebook, width)}
    for first, embeddings in known.items():
        rows = slice(first, first + len(embeddings))
        table = table.at[rows].set(embeddings + 0.1 * table[rows])
    vision = config.vision
    values["decoder/embedder/table"] = table
    values["vision/patch/kernel"] = cosine_filters(vision.patch_size, vision.hidden_size).T
    values["vision/position"] = grid_positions(vision.num_patches, vision.hidden_size)
    return with_parameters(model, values.__getitem__)


def waves(count: int, width: int) -> Array:
    """Embeddings of coordinates, similar for neighbours: unit rows float32[count, width] of sines
    and cosines with 0.25 to 32 periods."""
    turns = np.geomspace(0.25, 32, width // 2) * np.arange(count)[:, None] / count
    rows = np.concatenate([np.sin(2 * np.pi * turns), np.cos(2 * np.pi * turns)], 1)
    return jnp.asarray(rows * (2 / width) ** 0.5, jnp.float32)


def spread(codebook: np.ndarray, width: int) -> Array:
    """Embeddings of mask codes, similar for codes that draw similar shapes: unit rows
    float32[N, width], the centred codebook rotated at random into more dimensions."""
    rng = np.random.default_rng(0)
    rotation, _ = np.linalg.qr(rng.normal(size=(width, codebook.shape[1])))
    rows = (codebook - codebook.mean(0)) @ rotation.T
    return jnp.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), jnp.float32)


def cosine_filters(patch: int, width: int) -> Array:
    """Filters float32[U, W] of the patch embedding: the lowest cosine waves in grey, the lowest of
    all with less weight, and 12 in colour."""
    steps = np.arange(patch)
    basis = np.cos(np.pi * steps[:, None] * (steps + 0.5) / patch) * (2 / patch) ** 0.5
    frequencies = sorted(np.ndindex(patch, patch), key=lambda f: (f[0] ** 2 + f[1] ** 2, f))
    filters = []
    for v, u in frequencies[: width - 12]:
        weight = 0.14 * np.hypot(v, u) if v or u else 0.04
        filters.append((v, u, [weight] * 3))
    for v, u in frequencies[:6]:
        filters += [(v, u, [0.3, -0.3, 0]), (v, u, [0.15, 0.15, -0.3])]
    columns = [
        (np.outer(basis[v], basis[u])[..., None] * np.array(colour)).ravel()
        for v, u, colour in filters
    ]
    return jnp.asarray(np.stack(columns, 1), jnp.float32)


def grid_positions(patches: int, width: int) -> Array:
    """Position embeddings float32[P, W]: sines and cosines of row and column (arXiv:2205.01580)."""
    coordinates = np.divmod(np.arange(patches), int(patches**0.5))
    turns = np.pi / 2 / np.geomspace(1, 16, width // 4)
    parts = [f(axis[:, None] * turns) for axis in coordinates for f in (np.sin, np.cos)]
    return jnp.asarray(0.4 * np.concatenate(parts, 1), jnp.float32)
