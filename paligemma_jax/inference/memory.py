"""Whether a batch can fit the memory at all, checked before anything is compiled."""

from __future__ import annotations

import jax.numpy as jnp

from paligemma_jax.model.paligemma import PaliGemma
from paligemma_jax.sharding import devices
from paligemma_jax.sharding.mesh import mesh_of


def check_memory(model: PaliGemma, prompts: int, copies: int, slots: int) -> None:
    """Check a lower bound: the keys, values and logits of all answers of a batch.

    Args:
        prompts: Number of prompts.
        copies: Answers to each, for `Beam` and `BestOf`.
        slots: Length of the cache.

    Raises:
        ValueError: They need more memory than the devices have.
    """
    logits = 4 * model.config.decoder.vocab_size
    needed = prompts * copies * (cache_bytes(model, slots) + logits)
    mesh = mesh_of(model)
    available = devices.memory_bytes() * (mesh.size if mesh else 1)
    if needed > available:
        answers = f" with {copies} candidates each" if copies > 1 else ""
        raise ValueError(
            f"{prompts} prompts{answers} need {needed / 1e9:,.0f} GB for keys, values and logits, "
            f"but there are {available / 1e9:,.0f} GB of memory: use fewer beams or samples, a "
            "smaller batch or fewer new tokens"
        )


def cache_bytes(model: PaliGemma, slots: int) -> int:
    """Bytes of the keys and values of one row."""
    config, decoder = model.config, model.config.decoder
    itemsize = jnp.dtype(config.cache or config.dtype).itemsize
    heads = decoder.num_key_value_heads * decoder.head_dim
    return 2 * decoder.num_hidden_layers * heads * itemsize * slots


def check_logits_memory(model: PaliGemma, rows: int, tokens: int) -> None:
    """Check that the logits of all tokens of `rows` answers can be kept.

    Raises:
        ValueError: They need more memory than this host has.
    """
    V = model.config.decoder.vocab_size
    needed, available = 4 * rows * tokens * V, devices.host_memory_bytes()
    if needed > available:
        raise ValueError(
            f"logits of {rows} answers need {needed / 1e9:,.0f} GB, for {tokens} tokens of {V} "
            f"float32 values each, but there are {available / 1e9:,.0f} GB of memory: use "
            "top_log_probabilities, fewer prompts or fewer new tokens"
        )
