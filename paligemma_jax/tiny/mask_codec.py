"""The recipe of the embedded mask codec `assets/tiny/vae-digits.safetensors`: a small VQ-VAE of the shapes of handwritten digits.

    python -m paligemma_jax.tiny.mask_codec --output FILE.safetensors

First without codes, then from a codebook of k-means with them, as in arXiv:2301.02229: the mask drawn from the codes is to be the mask (squared
error), each code to be where the encoder points (and a quarter of that the other way round). It prints how well held-out digits come back.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from tqdm import tqdm

from paligemma_jax.model.tree import parameters, with_parameters
from paligemma_jax.processing.mask_codec import VOCABULARY, MaskCodec, save_codec
from paligemma_jax.tiny import digits
from paligemma_jax.training.batches import prefetch
from paligemma_jax.training.config import FinetuneConfig
from paligemma_jax.training.trainer import Trainer

ADAM = FinetuneConfig(data="", output="", learning_rate=2e-3, warmup=100)
BATCH = 64


def reconstruction_loss(codec: MaskCodec, batch: dict[str, Array], max_targets: int) -> tuple[Array, Array]:
    masks = batch["masks"]
    return jnp.square(codec.draw(codec.embed(masks)) - (2 * masks - 1)).mean(), jnp.float32(1)


def code_loss(codec: MaskCodec, batch: dict[str, Array], max_targets: int) -> tuple[Array, Array]:
    """The codes pass the gradient of what is drawn on to the encoder."""
    masks, hold = batch["masks"], jax.lax.stop_gradient
    x = codec.embed(masks)
    codes = codec.codebook[...][codec.nearest(x)]
    drawn = codec.draw(x + hold(codes - x))
    apart = jnp.square(codes - hold(x)).mean() + 0.25 * jnp.square(hold(codes) - x).mean()
    return jnp.square(drawn - (2 * masks - 1)).mean() + apart, jnp.float32(1)


def batches(masks: np.ndarray, steps: int, seed: int) -> Iterator[Any]:
    make = lambda step: {"masks": masks[np.random.default_rng((seed, step)).integers(len(masks), size=BATCH)]}
    return (partial(make, step) for step in range(steps))


def k_means(points: np.ndarray, centres: int, rounds: int = 20) -> np.ndarray:
    """float32[centres, E]: Lloyd's algorithm from random points; a centre that has none becomes a random point again."""
    rng = np.random.default_rng(0)
    found = points[rng.choice(len(points), centres, replace=False)]
    for _ in range(rounds):
        nearest = ((found**2).sum(1) - 2 * points @ found.T).argmin(1)
        count = np.bincount(nearest, minlength=centres)
        total = np.zeros_like(found)
        np.add.at(total, nearest, points)
        found = np.where(count[:, None] > 0, total / np.maximum(count, 1)[:, None], points[rng.choice(len(points), centres)])
    return found


def learn(codec: MaskCodec, masks: np.ndarray, steps: int, loss: Any, seed: int) -> MaskCodec:
    trainer = Trainer(codec, ADAM, steps, loss=loss)
    state = trainer.start()
    for batch in (bar := tqdm(prefetch(batches(masks, steps, seed)), "masks", steps, mininterval=10)):
        state, report = trainer.step(state, trainer.frozen, batch, max_targets=0)
        bar.set_postfix(loss=f"{float(report['loss']):.4f}", refresh=False)
    return trainer.result(state)


def train(narrow: int, width: int, steps: int, masks: np.ndarray) -> MaskCodec:
    """A codec of its own for masks float32[G, 64, 64]: `narrow` and `width` are its sizes."""
    codec = learn(MaskCodec(narrow, width), masks, steps // 4, reconstruction_loss, 1)
    points = np.asarray(jax.jit(MaskCodec.embed)(codec, masks[:1024])).reshape(-1, width)
    codebook = jnp.asarray(k_means(points, VOCABULARY))
    values = parameters(codec)
    codec = with_parameters(codec, lambda path: codebook if path == "codebook" else values[path])
    return learn(codec, masks, steps, code_loss, 2)


def overlaps(codec: MaskCodec, masks: np.ndarray) -> np.ndarray:
    """float[G]: intersection over union of every mask and what comes back of it."""
    back = codec.decode(codec.encode(masks)) > 0
    return (back & (masks > 0.5)).sum((1, 2)) / (back | (masks > 0.5)).sum((1, 2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True)
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--narrow", type=int, default=4)
    parser.add_argument("--width", type=int, default=32)
    args = parser.parse_args()
    codec = train(args.narrow, args.width, args.steps, digits.shapes(digits.glyphs(held_out=False, copies=12).alpha))
    save_codec(args.output, codec)
    masks = digits.shapes(digits.glyphs(held_out=True).alpha)
    found, used = overlaps(codec, masks), np.unique(codec.encode(masks)).size
    print(f"held-out digits: mean IoU {found.mean():.4f}, 5 % below {np.quantile(found, 0.05):.4f}; {used} codes in use")


if __name__ == "__main__":
    from paligemma_jax.errors import report_errors

    report_errors(main)
