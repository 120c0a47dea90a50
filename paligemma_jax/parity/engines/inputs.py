"""Inputs of programs that know no image tokens."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from paligemma_jax.parity.case import ParityCase
from paligemma_jax.processing.processor import Inputs


def image_first(case: ParityCase, engine: str) -> ParityCase:
    """The case with pads at the end of each row, after one image and the text.

    Raises:
        ValueError: The engine cannot compute the case.
    """
    config = case.checkpoint.config
    decoder = config.decoder
    if not decoder.tie_word_embeddings:
        raise ValueError(f"{engine} has no output head apart from its embedding table")
    if engine == "big_vision" and decoder.model_type == "gemma2":
        scales = (decoder.head_dim, decoder.hidden_size // decoder.num_attention_heads)
        if decoder.query_pre_attn_scalar not in scales:
            raise ValueError(
                f"big_vision scales by a head's size or hidden_size / heads: query_pre_attn_scalar "
                f"must be one of {scales}, got {decoder.query_pre_attn_scalar}"
            )
    inputs, prompts = right_padded(case.inputs), right_padded(case.prompts)
    count = config.vision.num_patches
    is_image = (inputs.tokens == config.image_token_id) & inputs.valid
    if not is_image[:, :count].all() or is_image[:, count:].any():
        raise ValueError(f"{engine} takes one image for each prompt, before its text")
    return replace(case, inputs=inputs, prompts=prompts)


def right_padded(inputs: Inputs) -> Inputs:
    """The same rows with pads at the end."""
    order = np.argsort(~np.asarray(inputs.valid), axis=1, kind="stable")
    names = ("tokens", "valid", "prefix", "targets")
    moved = {name: np.take_along_axis(getattr(inputs, name), order, axis=1) for name in names}
    return replace(inputs, **moved)
