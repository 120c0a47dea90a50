"""Shortcuts that the decoding tests share, without torch."""

from __future__ import annotations

from functools import partial

import jax

from paligemma_jax.inference import generate
from paligemma_jax.inference.options import DecodingOptions
from paligemma_jax.inference.sampler import History
from paligemma_jax.inference.sampling import Sample


def tokens_of(model, inputs, max_new_tokens, *, seeds=None, slots=0, **fields):
    """Generate tokens int32[B, N]. `fields` are those of `DecodingOptions`."""
    options = DecodingOptions(max_new_tokens, **fields)
    return generate.generate(model, inputs, options, seeds=seeds, slots=slots).tokens


def seen_ids(model, inputs):
    """Which ids occur among the valid tokens of each row, bool[B, V]."""
    prompts = History.of_prompts(inputs.tokens, inputs.valid, inputs.tokens.shape[1])
    return Sample(repetition_penalty=2.0).init(prompts, model.config.decoder.vocab_size)


def prefill(model, inputs, slots):
    """Logits float32[B, V] after the prompt, and the cache."""
    return _prefill(model, inputs, generate.encode_inputs(model, inputs), slots)


@partial(jax.jit, static_argnames="slots")
def _prefill(model, inputs, features, slots):
    return model.prefill(inputs.tokens, features, inputs.valid, inputs.prefix, slots)
