"""Short forms that the tests of decoding share; no torch."""

from __future__ import annotations

from functools import partial

import jax

from paligemma_jax.inference import generate


def tokens_of(*args, **options):
    """int32[B, N]: the tokens that `generate.generate` gives."""
    return generate.generate(*args, **options).tokens


def prefill(model, inputs, slots):
    """Logits float32[B, V] after the prompt, and the cache."""
    return _prefill(model, inputs, generate.encode_inputs(model, inputs), slots)


@partial(jax.jit, static_argnames="slots")
def _prefill(model, inputs, features, slots):
    return model.prefill(inputs.tokens, features, inputs.valid, inputs.prefix, slots)
