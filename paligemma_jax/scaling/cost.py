"""Work and traffic counted from a config: what a machine at its limit would need, whatever the implementation; and what this machine's limit is."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Collection

import jax
import jax.numpy as jnp

from paligemma_jax.model.config import PaliGemmaConfig
from paligemma_jax.processing.processor import Inputs


def vision_flops(config: PaliGemmaConfig) -> int:
    """Of the matrix products for one image, projector included: 2 per multiply-add; norms, softmax and activations are not counted."""
    vision = config.vision
    P, W, F = vision.num_patches, vision.hidden_size, vision.intermediate_size
    layer = P * (4 * W * W + 2 * W * F) + 2 * P * P * W  # q, k, v, o; up, down; scores and their product with v
    return 2 * (P * 3 * vision.patch_size**2 * W + vision.num_hidden_layers * layer + P * W * config.decoder.hidden_size)


def prefill_flops(config: PaliGemmaConfig, tokens: int) -> int:
    """Of one row with one image and `tokens` tokens in all, up to the logits of the first new token. All pairs count: the prefix is bidirectional."""
    decoder = config.decoder
    attention = 2 * tokens**2 * decoder.num_attention_heads * decoder.head_dim
    layers = tokens * _matrices(config) + decoder.num_hidden_layers * attention
    return vision_flops(config) + 2 * (layers + decoder.vocab_size * decoder.hidden_size)


def decode_bytes(config: PaliGemmaConfig, cached: int, rows: int, itemsize: int) -> int:
    """Read for one more token in each of `rows` rows: the decoder's weights once (its table is the head), `cached` keys and values a row."""
    decoder = config.decoder
    norms = (decoder.num_hidden_layers * (4 if decoder.post_norms else 2) + 1) * decoder.hidden_size
    weights = _matrices(config) + norms + decoder.vocab_size * decoder.hidden_size
    cache = 2 * decoder.num_hidden_layers * decoder.num_key_value_heads * decoder.head_dim
    return itemsize * (weights + rows * cached * cache)


def training_flops(config: PaliGemmaConfig, inputs: Inputs, learns: Collection[str], encodes: bool = True) -> int:
    """Of one step on `inputs`, where the parameters at these paths learn: each product forward once, once more for the gradient of what came in where

    something before it learns, and once more where its own weights do (those of LoRA are not counted). What is computed again to save memory
    does not count. `encodes`: the image encoder runs.
    """
    decoder, (rows, tokens), matches = config.decoder, inputs.tokens.shape, lambda pattern: any(re.match(pattern, path) for path in learns)
    images = int((inputs.tokens == config.image_token_id).sum()) // config.vision.num_patches
    vision = (3 if matches(r"vision/.*(kernel|position)") else 2 if matches(r"vision/") else 1) if encodes else 0
    attention = 2 * tokens**2 * decoder.num_attention_heads * decoder.head_dim * decoder.num_hidden_layers
    products = tokens * _matrices(config) * (3 if matches(r"decoder/layers/.*kernel") else 2) + 3 * attention
    head = int(inputs.targets.sum()) * decoder.vocab_size * decoder.hidden_size * (3 if matches("decoder/embedder") else 2)
    return vision * images * vision_flops(config) + 2 * (rows * products + head)


def matrix_rate(dtype: str, side: int | None = None) -> float:
    """FLOP per second of a big square product on this machine, best of a few."""
    side = side or (1024 if jax.default_backend() == "cpu" else 8192)
    return 2 * side**3 / best_time(jax.jit(lambda x: x @ x), jnp.ones((side, side), dtype))


def best_time(function: Callable, x: jax.Array, repeats: int = 8) -> float:
    """Seconds."""
    jax.block_until_ready(function(x))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function(x))
        times.append(time.perf_counter() - start)
    return min(times)


def _matrices(config: PaliGemmaConfig) -> int:
    """Numbers in the matrices of all decoder layers: multiply-adds per token."""
    c = config.decoder
    heads = 2 * (c.num_attention_heads + c.num_key_value_heads) * c.head_dim  # q and o, k and v
    return c.num_hidden_layers * c.hidden_size * (heads + 3 * c.intermediate_size)
