"""Minimum FLOPs and memory traffic of a model, counted from its config."""

from __future__ import annotations

import re
from collections.abc import Collection

import numpy as np

from paligemma_jax.model.config import PaliGemmaConfig


def vision_flops(config: PaliGemmaConfig) -> int:
    """FLOPs of the matrix products for one image, projector included: 2 per multiply-add. Norms,
    softmax and activations are not counted."""
    vision = config.vision
    P, W, F = vision.num_patches, vision.hidden_size, vision.intermediate_size
    # q, k, v, o; up, down; scores and their product with v
    layer = P * (4 * W * W + 2 * W * F) + 2 * P * P * W
    patches = P * 3 * vision.patch_size**2 * W
    projector = P * W * config.decoder.hidden_size
    return 2 * (patches + vision.num_hidden_layers * layer + projector)


def prefill_flops(config: PaliGemmaConfig, tokens: int) -> int:
    """FLOPs of one row with one image and `tokens` tokens in total, up to the logits of the first
    new token. All pairs of tokens count: the prefix is bidirectional."""
    decoder = config.decoder
    layers = tokens * _matrix_size(config) + _attention_size(config, tokens)
    return vision_flops(config) + 2 * (layers + decoder.vocab_size * decoder.hidden_size)


def decode_bytes(config: PaliGemmaConfig, cached: int, rows: int, itemsize: int) -> int:
    """Bytes read for one more token in each of `rows` rows: the decoder's weights once (of the
    tables, only the head), and the keys and values of `cached` tokens per row, or in local layers
    of their window."""
    decoder = config.decoder
    norms = decoder.num_hidden_layers * (4 if decoder.post_norms else 2) + 1
    head = decoder.vocab_size * decoder.hidden_size
    weights = _matrix_size(config) + norms * decoder.hidden_size + head
    heads = decoder.num_key_value_heads * decoder.head_dim
    slots = sum(min(cached, window) for window in decoder.windows(config.profile, decoding=True))
    return itemsize * (weights + rows * slots * 2 * heads)


def training_flops(
    config: PaliGemmaConfig,
    tokens: np.ndarray,
    targets: np.ndarray,
    trainable: Collection[str],
    encodes: bool = True,
) -> int:
    """FLOPs of one training step.

    Each product counts once forward, once more for the gradient of its input where something before
    it is trainable, and once more where its own weights are (LoRA's own are not counted).
    Rematerialization does not count.

    Args:
        tokens: int[B, T] ids; image tokens give the number of images.
        targets: bool[B, T], the tokens with a loss.
        trainable: Parameter paths.
        encodes: Whether the image encoder runs.
    """

    def trains(pattern: str) -> bool:
        return any(re.match(pattern, path) for path in trainable)

    decoder, (rows, length) = config.decoder, tokens.shape
    images = int((tokens == config.image_token_id).sum()) // config.vision.num_patches
    vision = 3 if trains(r"vision/.*(kernel|position)") else 2 if trains(r"vision/") else 1
    passes = 3 if trains(r"decoder/layers/.*kernel") else 2
    products = length * _matrix_size(config) * passes + 3 * _attention_size(config, length)
    table = "decoder/embedder" if decoder.tie_word_embeddings else "decoder/head"
    head = decoder.vocab_size * decoder.hidden_size * (3 if trains(table) else 2)
    encoder = vision * images * vision_flops(config) if encodes else 0
    return encoder + 2 * (rows * products + int(targets.sum()) * head)


def _matrix_size(config: PaliGemmaConfig) -> int:
    """Numbers in the matrices of all decoder layers: multiply-adds per token."""
    c = config.decoder
    heads = 2 * (c.num_attention_heads + c.num_key_value_heads) * c.head_dim  # q and o, k and v
    return c.num_hidden_layers * c.hidden_size * (heads + 3 * c.intermediate_size)


def _attention_size(config: PaliGemmaConfig, tokens: int) -> int:
    """Multiply-adds of the scores of all decoder layers and of their products with v."""
    c = config.decoder
    return c.num_hidden_layers * 2 * tokens**2 * c.num_attention_heads * c.head_dim
