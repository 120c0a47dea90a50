"""A plain training configuration, and a small batch for the embedded model."""

from __future__ import annotations

import numpy as np

from paligemma_jax.processing.processor import Inputs
from paligemma_jax.training.config import FinetuneConfig

# x -= 0.1 * gradient
TOY = FinetuneConfig(
    "", "", optimizer="sgd", beta1=0.0, learning_rate=0.1, warmup=0, schedule="constant", clip=0
)


def batch(model, padding=0, side="right", pad_token=0):
    """Two rows of 9 and 7 text tokens after the image, the last 5 and 3 of them targets,
    padded to 9 text tokens, and then by `padding` columns of `pad_token`."""
    rng = np.random.default_rng(0)
    P, S = model.config.vision.num_patches, model.config.vision.image_size
    image_tokens = np.full((2, P), model.config.image_token_id)
    tokens = np.concatenate([image_tokens, rng.integers(5, 400, (2, 9))], axis=1)
    images = rng.uniform(-1, 1, (2, S, S, 3)).astype(np.float32)
    positions = np.arange(P + 9)
    valid = positions < np.array([[P + 9], [P + 7]])
    targets = valid & (positions >= P + 4)
    width = [(0, 0), (padding, 0) if side == "left" else (0, padding)]
    tokens, valid, targets = (np.pad(a, width) for a in (tokens, valid, targets))
    tokens = np.where(valid, tokens, pad_token).astype(np.int32)
    return Inputs(tokens, images, valid, valid & ~targets, targets)
