"""The small random checkpoint and inputs of the goldens in tests/golden/engines."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from convert import huggingface
from paligemma_jax.model.config import DecoderConfig, PaliGemmaConfig, VisionConfig
from paligemma_jax.parity.case import random_case
from paligemma_jax.parity.random_weights import random_checkpoint

CONFIG = PaliGemmaConfig(
    vision=VisionConfig(
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=88,
        image_size=56,
    ),
    decoder=DecoderConfig(
        hidden_size=56,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=96,
        vocab_size=320,
        query_pre_attn_scalar=12,
        sliding_window=20,
    ),
    image_token_id=300,
)


def write_checkpoint(directory):
    huggingface.write(directory, random_checkpoint(CONFIG))
    return directory


def golden_inputs(file):
    """The inputs of a golden file as `Inputs`: two rows of 24 tokens of prompt and 6 of answer."""
    case = random_case(CONFIG, 8, 6)
    with np.load(file) as content:
        arrays = {name: content[name] for name in ("tokens", "valid", "targets", "images")}
    return replace(case.inputs, **arrays, prefix=~arrays["targets"])
