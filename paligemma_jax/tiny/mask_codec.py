"""The recipe of the embedded mask codec: a small VQ-VAE of the shapes of handwritten digits.

As in arXiv:2301.02229, trained first without codes, then with a codebook from k-means. The loss is
the squared error of the mask drawn from the codes, plus the distance between the codes and the
output of the encoder (a quarter of that for the encoder).
"""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax import Array

from paligemma_jax.model.tree import parameters, with_parameters
from paligemma_jax.processing.mask_codec import VOCABULARY, MaskCodec, save_codec
from paligemma_jax.tiny.digits import glyph_masks, glyphs
from paligemma_jax.tiny.loop import ArrayBatch, train_module
from paligemma_jax.training.config import FinetuneConfig
from paligemma_jax.training.trainer import LossFunction

CONFIG = FinetuneConfig(data="", output="", learning_rate=2e-3, warmup=100)
BATCH_SIZE = 64


def reconstruction_loss(
    codec: MaskCodec, batch: dict[str, Array], max_targets: int
) -> tuple[Array, Array]:
    """The loss without codes."""
    masks = batch["masks"]
    return jnp.square(codec.draw(codec.embed(masks)) - (2 * masks - 1)).mean(), jnp.float32(1)


def code_loss(codec: MaskCodec, batch: dict[str, Array], max_targets: int) -> tuple[Array, Array]:
    """The loss with codes. The gradient of the drawing passes straight through them to the
    encoder."""
    masks, fixed = batch["masks"], jax.lax.stop_gradient
    x = codec.embed(masks)
    codes = codec.codebook[...][codec.nearest(x)]
    drawn = codec.draw(x + fixed(codes - x))
    distance = jnp.square(codes - fixed(x)).mean() + 0.25 * jnp.square(fixed(codes) - x).mean()
    return jnp.square(drawn - (2 * masks - 1)).mean() + distance, jnp.float32(1)


def make_batch(masks: np.ndarray, seed: int, step: int) -> ArrayBatch:
    """Make a batch of random masks for one step."""
    rng = np.random.default_rng((seed, step))
    return {"masks": masks[rng.integers(len(masks), size=BATCH_SIZE)]}


def k_means(points: np.ndarray, count: int, rounds: int = 20) -> np.ndarray:
    """Centres float32[count, E] by Lloyd's algorithm from random points. A centre without points is
    replaced by a random point."""
    rng = np.random.default_rng(0)
    centres = points[rng.choice(len(points), count, replace=False)]
    for _ in range(rounds):
        nearest = ((centres**2).sum(1) - 2 * points @ centres.T).argmin(1)
        sizes = np.bincount(nearest, minlength=count)[:, None]
        sums = np.zeros_like(centres)
        np.add.at(sums, nearest, points)
        random = points[rng.choice(len(points), count)]
        centres = np.where(sizes > 0, sums / np.maximum(sizes, 1), random)
    return centres


def train_codec(narrow: int, width: int, steps: int, masks: np.ndarray) -> MaskCodec:
    """Train a codec of these sizes on masks float32[G, 64, 64]: `steps` // 4 steps without codes,
    then `steps` with them."""

    def learn(codec: MaskCodec, steps: int, loss: LossFunction, seed: int) -> MaskCodec:
        def make(step: int) -> ArrayBatch:
            return make_batch(masks, seed, step)

        return train_module(codec, CONFIG, steps, loss, make, "mask codec")

    codec = learn(MaskCodec(narrow, width), steps // 4, reconstruction_loss, seed=1)
    points = np.asarray(jax.jit(MaskCodec.embed)(codec, masks[:1024])).reshape(-1, width)
    values = dict(parameters(codec))
    values["codebook"] = jnp.asarray(k_means(points, VOCABULARY))
    return learn(with_parameters(codec, values.__getitem__), steps, code_loss, seed=2)


def reconstruction_ious(codec: MaskCodec, masks: np.ndarray) -> np.ndarray:
    """float[G]: the IoU of every mask and its reconstruction."""
    decoded, masks = codec.decode(codec.encode(masks)) > 0, masks > 0.5
    return (decoded & masks).sum((1, 2)) / (decoded | masks).sum((1, 2))


def make_codec(output: Path, steps: int = 2400, narrow: int = 4, width: int = 32) -> None:
    """Train the mask codec of `tiny` and print how well it reconstructs held-out digits.

    Args:
        output: File to write, vae-NAME.safetensors.
        steps: Training steps with codes, after a quarter as many without codes.
        narrow: Channels of the first convolution.
        width: Size of a code's vector.
    """
    training_masks = glyph_masks(glyphs(held_out=False, copies=12).alpha)
    codec = train_codec(narrow, width, steps, training_masks)
    save_codec(output, codec)
    masks = glyph_masks(glyphs(held_out=True).alpha)
    ious, used = reconstruction_ious(codec, masks), np.unique(codec.encode(masks)).size
    worst = np.quantile(ious, 0.05)
    print(f"held-out digits: mean IoU {ious.mean():.4f}, 5 % below {worst:.4f}; {used} codes used")


if __name__ == "__main__":
    from paligemma_jax.errors import report_errors

    report_errors(lambda: tyro.cli(make_codec, prog="python -m paligemma_jax.tiny.mask_codec"))
