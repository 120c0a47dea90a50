"""."""

from __future__ import annotations

import numpy as np

from paligemma_jax.processing.processor import Inputs
from paligemma_jax.training.config import FinetuneConfig

TOY = FinetuneConfig("", "", optimizer="sgd", beta1=0.0, learning_rate=0.1, warmup=0, schedule="constant", clip=0)


def batch(model, extra=0, side="right", fill=0):
    """Two rows of tiny, with `extra` columns of padding, whose tokens are `fill`."""
    rng, P = np.random.default_rng(0), model.config.vision.num_patches
    tokens = np.concatenate([np.full((2, P), model.config.image_token_id), rng.integers(5, 400, (2, 9))], 1).astype(np.int32)
    images = rng.uniform(-1, 1, (2, model.config.vision.image_size, model.config.vision.image_size, 3)).astype(np.float32)
    valid = np.arange(P + 9) < np.array([[P + 9], [P + 7]])
    targets = valid & (np.arange(P + 9) >= P + 4)
    pad = [(0, 0), (extra, 0) if side == "left" else (0, extra)]
    tokens, valid, targets = (np.pad(a, pad) for a in (tokens, valid, targets))
    tokens = np.where(valid, tokens, fill).astype(np.int32)
    return Inputs(tokens, images, valid, valid & ~targets, targets)
