"""Head starts for training a small PaliGemma from nothing in minutes: known structure to begin with, and something to say about every patch.

Answers in words alone teach an image encoder slowly. A linear probe that is thrown away afterwards asks each patch which digit it belongs to,
where that is and what it looks like; the picture matters most: it gives a gradient long before the digits can be told apart.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array

from paligemma_jax.model.config import PaliGemmaConfig
from paligemma_jax.model.paligemma import PaliGemma
from paligemma_jax.model.tree import parameters, with_parameters
from paligemma_jax.processing.tokenizer import Tokenizer
from paligemma_jax.tiny import digits

PROBE = {"label": 11, "place": 5, "box": 4, "look": 64}  # outputs: digit or none, place in reading order or none, y0 x0 y1 x1, 8 x 8 pixels


def initial(config: PaliGemmaConfig, tokenizer: Tokenizer, codebook: np.ndarray) -> PaliGemma:
    """A model of random parameters, except where the first hundreds of steps would only find out what is known: see the four functions.

    codebook: float32[128, E] of the mask codec.
    """
    model = PaliGemma(config, nnx.Rngs(0))
    start = dict(parameters(model))
    table = start["decoder/embedder/table"]
    for first, known in ((tokenizer.loc(0), waves(1024, table.shape[1])), (tokenizer.seg(0), spread(codebook, table.shape[1]))):
        rows = slice(first, first + len(known))
        table = table.at[rows].set(known + 0.1 * table[rows])
    start["decoder/embedder/table"] = table
    start["vision/patch/kernel"] = cosines(config.vision.patch_size, config.vision.hidden_size).T
    start["vision/position"] = grid_positions(config.vision.num_patches, config.vision.hidden_size)
    return with_parameters(model, start.__getitem__)


def waves(n: int, width: int) -> Array:
    """float32[n, width]: unit rows, alike for neighbouring coordinates: sines and cosines of 0.25 to 32 turns."""
    turns = np.geomspace(0.25, 32, width // 2) * np.arange(n)[:, None] / n
    return jnp.asarray(np.concatenate([np.sin(2 * np.pi * turns), np.cos(2 * np.pi * turns)], 1) * (2 / width) ** 0.5, jnp.float32)


def spread(codebook: np.ndarray, width: int) -> Array:
    """float32[N, width]: unit rows, alike for codes that draw alike: the codebook about its mean, turned at random into more dimensions."""
    turn, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(width, codebook.shape[1])))
    rows = (codebook - codebook.mean(0)) @ turn.T
    return jnp.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), jnp.float32)


def cosines(patch: int, width: int) -> Array:
    """float32[U, W]: filters of the patch embedding: its lowest cosine waves in grey, with less weight on the slow ones; a few in colour."""
    steps = np.arange(patch)
    basis = np.cos(np.pi * steps[:, None] * (steps + 0.5) / patch) * (2 / patch) ** 0.5
    slowest = sorted(np.ndindex(patch, patch), key=lambda f: (f[0] ** 2 + f[1] ** 2, f))
    filters = [(np.outer(basis[v], basis[u]), [0.14 * np.hypot(v, u) if v or u else 0.04] * 3) for v, u in slowest[: width - 12]]
    filters += [(np.outer(basis[v], basis[u]), colour) for v, u in slowest[:6] for colour in ([0.3, -0.3, 0], [0.15, 0.15, -0.3])]
    return jnp.asarray(np.stack([(wave[..., None] * np.array(colour)).ravel() for wave, colour in filters], 1), jnp.float32)


def grid_positions(patches: int, width: int) -> Array:
    """float32[P, W]: sines and cosines of row and column (arXiv:2205.01580)."""
    place = np.divmod(np.arange(patches), int(patches**0.5))
    turns = np.pi / 2 / np.geomspace(1, 16, width // 4)
    return jnp.asarray(0.4 * np.concatenate([f(axis[:, None] * turns) for axis in place for f in (np.sin, np.cos)], 1), jnp.float32)


def patch_targets(scenes: digits.Scenes, source: digits.Glyphs, side: int) -> dict[str, np.ndarray]:
    """What the probe is to say of every patch: label int[B, P] (10: none), place int[B, P] (4: none), box [B, P, 4], look [B, P, 64] in 0..1."""
    edges = np.linspace(0, digits.SIZE, side + 1)
    top, left, bottom, right = np.moveaxis(scenes.boxes, -1, 0)[..., None]
    rows, columns = (np.clip(np.minimum(b, edges[1:]) - np.maximum(a, edges[:-1]), 0, None) for a, b in ((top, bottom), (left, right)))
    area = (rows[..., None] * columns[..., None, :]).reshape(*scenes.labels.shape, -1)  # [B, K, P], in pixels
    owner, owned = area.argmax(1), area.max(1) > 28
    pick = lambda values: np.take_along_axis(values, owner, 1)
    look = source.alpha.reshape(-1, 8, digits.GLYPH // 8, 8, digits.GLYPH // 8).mean((2, 4)).reshape(-1, 64)
    box = np.take_along_axis(scenes.boxes, owner[..., None], 1) / digits.SIZE
    label, place = np.where(owned, pick(scenes.labels), 10), np.where(owned, owner, digits.MAX_DIGITS)
    return {"label": label, "place": place, "box": box.astype(np.float32), "look": look[pick(scenes.glyphs)]}


def patch_loss(said: Array, batch: dict[str, Array]) -> Array:
    """The loss of what the probe says of every patch, [B, P, sum of PROBE]: what and which one it is, where it is, what it looks like."""
    label, place, box, look = jnp.split(said, np.cumsum(list(PROBE.values()))[:-1], axis=-1)
    owned = batch["label"] < 10
    named = optax.softmax_cross_entropy_with_integer_labels(label, batch["label"]).mean()
    ordered = optax.softmax_cross_entropy_with_integer_labels(place, batch["place"]).mean()
    error = 4 * jnp.abs(box - batch["box"]).mean(-1) + 20 * jnp.square(look - batch["look"]).mean(-1)
    return named + ordered + (error * owned).sum() / jnp.maximum(owned.sum(), 1)
