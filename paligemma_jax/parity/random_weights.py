"""Random weights of any config, made on use."""

from __future__ import annotations

import zlib

import numpy as np

from convert.checkpoint import Checkpoint
from convert.match import Weight, huggingface_weights
from convert.tensor import DTYPES, Index, Tensor
from paligemma_jax.model.config import PaliGemmaConfig


def random_checkpoint(config: PaliGemmaConfig, seed: int = 0) -> Checkpoint:
    """Make random weights, norms and biases included, so that mistakes show. The logits have a
    standard deviation of about 4."""
    dtype = DTYPES[config.dtype]
    tensors = {
        weight.path: weight.from_file(_random_tensor(weight, dtype, seed))
        for weight in huggingface_weights(config)
    }
    return Checkpoint("huggingface", config, tensors)


def _random_tensor(weight: Weight, dtype: np.dtype, seed: int) -> Tensor:
    """LayerNorm scales are drawn around 1, RMSNorm scales around 0. Attention adds little, since
    averages over many random image tokens would make all tokens similar."""
    shape, path = weight.file_shape, weight.path
    mean = 1.0 if path.startswith("vision") and path.endswith("scale") else 0.0
    if path == "decoder/norm/scale":
        mean = 20.0
    elif path.endswith("post_attention_norm/scale"):
        mean -= 0.7
    std = 0.3
    if len(shape) > 1:
        std = np.prod(shape[1:]) ** -0.5 * (0.2 if path.endswith("table") else 1.0)

    def read(index: Index) -> np.ndarray:
        rng = np.random.default_rng([seed, zlib.crc32(path.encode())])
        values = rng.standard_normal(shape, np.float32)
        values *= np.float32(std)
        values += np.float32(mean)
        return (
            values[index].astype(dtype, copy=False) if index else values.astype(dtype, copy=False)
        )

    return Tensor(shape, dtype, read)
