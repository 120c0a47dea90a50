"""Work and traffic counted from a config: what a machine at its limit would need, whatever the implementation."""

from __future__ import annotations

from paligemma_jax.model.config import PaliGemmaConfig


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


def _matrices(config: PaliGemmaConfig) -> int:
    """Numbers in the matrices of all decoder layers: multiply-adds per token."""
    c = config.decoder
    heads = 2 * (c.num_attention_heads + c.num_key_value_heads) * c.head_dim  # q and o, k and v
    return c.num_hidden_layers * c.hidden_size * (heads + 3 * c.intermediate_size)
