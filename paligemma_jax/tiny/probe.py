"""Pretraining of the image encoder of `tiny`, patch by patch.

Answers alone teach an image encoder slowly. A linear probe, discarded afterwards, predicts for each
patch which digit it belongs to, where that digit is, and what it looks like. The last matters most:
it gives a gradient long before the digits can be told apart.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array

from paligemma_jax.model.layers import Linear
from paligemma_jax.model.paligemma import PaliGemma
from paligemma_jax.tiny.digits import GLYPH, Glyphs, glyphs
from paligemma_jax.tiny.loop import ArrayBatch, train_module
from paligemma_jax.tiny.scenes import MAX_DIGITS, SIZE, Scenes, compose
from paligemma_jax.training.config import FinetuneConfig

# Sizes of the probe's outputs: digit or none; place in reading order or none; y0 x0 y1 x1; 8x8
# pixels.
OUTPUTS = {"label": 11, "place": 5, "box": 4, "look": 64}
NO_DIGIT = 10
MIN_PIXELS = 28  # of a digit's box, for a patch to belong to it


class ProbedEncoder(nnx.Module):
    """The image encoder with a linear probe on every patch."""

    def __init__(self, model: PaliGemma):
        shape = (sum(OUTPUTS.values()), model.config.vision.hidden_size)
        self.vision = model.vision
        self.probe = Linear("OW", shape, bias=True, rngs=nnx.Rngs(1))


def pretrain_encoder(model: PaliGemma, config: FinetuneConfig, steps: int) -> None:
    """Train the image encoder of `model` in place.

    Scenes start with four digits, black on white, of one height and on the patch grid, and become
    more and more varied; finally half of them have 1 to 4 digits.
    """
    source = glyphs(held_out=False, copies=12)
    vision = model.config.vision
    side = vision.image_size // vision.patch_size

    def make_batch(step: int) -> ArrayBatch:
        return pretraining_batch(step, steps, 16, side, source)

    encoder = ProbedEncoder(model)
    encoder = train_module(encoder, config, steps, probe_loss, make_batch, "image encoder")
    model.vision = encoder.vision


def pretraining_batch(step: int, steps: int, size: int, side: int, source: Glyphs) -> ArrayBatch:
    """Images and targets of one step.

    Args:
        step: Number of the step, out of `steps`.
        steps: Length of the training.
        size: Number of scenes.
        side: Patches along the side of an image.
        source: Digits to draw from.
    """
    variety = float(np.clip(step / steps / 0.4 - 0.3, 0, 1))
    scenes = compose(
        np.random.default_rng((2, step)),
        source,
        size,
        count=MAX_DIGITS if step % 2 or variety < 1 else None,
        variety=variety,
        grid=max(1, round(14 * (1 - 3 * variety))),
    )
    return {"images": scenes.images, **patch_targets(scenes, source, side)}


def patch_targets(scenes: Scenes, source: Glyphs, side: int) -> ArrayBatch:
    """The targets of every patch.

    Returns:
        label int[B, P] (10: none), place int[B, P] (4: none), box float32[B, P, 4] in 0..1, and
        look float32[B, P, 64], the glyph in 0..1.
    """
    edges = np.linspace(0, SIZE, side + 1)
    top, left, bottom, right = np.moveaxis(scenes.boxes, -1, 0)[..., None]

    def overlap(start: np.ndarray, end: np.ndarray) -> np.ndarray:
        return np.clip(np.minimum(end, edges[1:]) - np.maximum(start, edges[:-1]), 0, None)

    rows, columns = overlap(top, bottom), overlap(left, right)
    area = rows[..., None] * columns[..., None, :]  # in pixels
    area = area.reshape(*scenes.labels.shape, -1)  # [B, K, P]
    owner, owned = area.argmax(1), area.max(1) > MIN_PIXELS
    block = GLYPH // 8
    looks = source.alpha.reshape(-1, 8, block, 8, block).mean((2, 4)).reshape(-1, 64)
    labels, glyph = (
        np.take_along_axis(values, owner, 1) for values in (scenes.labels, scenes.glyphs)
    )
    boxes = np.take_along_axis(scenes.boxes, owner[..., None], 1) / SIZE
    return {
        "label": np.where(owned, labels, NO_DIGIT),
        "place": np.where(owned, owner, MAX_DIGITS),
        "box": boxes.astype(np.float32),
        "look": looks[glyph],
    }


def probe_loss(
    model: ProbedEncoder, batch: dict[str, Array], max_targets: int
) -> tuple[Array, Array]:
    """The loss of a batch, and its divisor."""
    outputs = model.probe(model.vision(batch["images"] / 127.5 - 1))
    return patch_loss(outputs, batch), jnp.float32(1)


def patch_loss(outputs: Array, batch: dict[str, Array]) -> Array:
    """The loss of the probe's outputs [B, P, sum of OUTPUTS]."""
    starts = np.cumsum(list(OUTPUTS.values()))[:-1]
    label, place, box, look = jnp.split(outputs, starts, axis=-1)
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels
    named = cross_entropy(label, batch["label"]).mean()
    ordered = cross_entropy(place, batch["place"]).mean()
    error = 4 * jnp.abs(box - batch["box"]).mean(-1)
    error += 20 * jnp.square(look - batch["look"]).mean(-1)
    owned = batch["label"] < NO_DIGIT
    return named + ordered + (error * owned).sum() / jnp.maximum(owned.sum(), 1)
