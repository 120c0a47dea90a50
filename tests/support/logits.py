"""Logits of a model on a small batch."""

from __future__ import annotations

import jax
import numpy as np
from support.toys import batch


def logits(model):
    inputs = batch(model)
    arguments = inputs.tokens, inputs.images, inputs.valid, inputs.prefix
    return np.asarray(jax.jit(type(model).__call__)(model, *arguments))
