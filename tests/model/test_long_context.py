"""Long sequences: attention in chunks of queries equals attention at once, in values and gradients,
and its memory grows with T, not with T squared."""

from __future__ import annotations

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paligemma_jax.model import attention
from paligemma_jax.model.masks import Mask, token_span


def arguments(T=70, S=70, B=2, N=4, K=2, H=16, seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    q, k, v = (
        jax.random.normal(key, (B, length, heads, H))
        for key, length, heads in zip(keys, (T, S, S), (N, K, K), strict=True)
    )
    valid = jnp.arange(S) >= jnp.array([0, 9])[:B, None]
    tokens = token_span(valid, valid & (jnp.arange(S) < 40), 1)
    queries = jax.tree.map(lambda a: a[:, S - T :], tokens)
    return q, k, v, dict(scale=0.3, softcap=5.0, mask=Mask(queries, tokens, 12))


@pytest.mark.parametrize("chunk", [7, 16, 35, 69])
@pytest.mark.parametrize("masked", [True, False], ids=["decoder", "vision"])
def test_chunked_attention_equals_attention_at_once(chunk, masked):
    """Within 1e-5, gradients too, whether or not the chunk divides T."""
    q, k, v, options = arguments()
    options = options if masked else dict(scale=0.3)

    def loss(q, k, v):
        return (attention.attend(q, k, v, **options) ** 2).sum()

    plain, plain_grads = attention.attend(q, k, v, **options), jax.grad(loss, (0, 1, 2))(q, k, v)
    with mock.patch.object(attention, "CHUNK", chunk):
        chunked, grads = attention.attend(q, k, v, **options), jax.grad(loss, (0, 1, 2))(q, k, v)
    np.testing.assert_allclose(chunked, plain, atol=1e-5)
    for actual, expected in zip(grads, plain_grads, strict=True):
        np.testing.assert_allclose(actual, expected, atol=1e-5 * float(jnp.abs(expected).max()))


def temporaries(T: int, chunk: int) -> int:
    """Temporary memory in bytes of attention over T tokens, one layer of 3b."""
    q, k = (jax.ShapeDtypeStruct((1, T, heads, 256), jnp.float32) for heads in (8, 4))
    flags = jax.ShapeDtypeStruct((1, T), bool)

    def run(q, k, v, valid):
        tokens = token_span(valid, valid, 1)
        return attention.attend(
            q, k, v, scale=1 / 16, softcap=50.0, mask=Mask(tokens, tokens, 4096)
        )

    with mock.patch.object(attention, "CHUNK", chunk):
        return temp(jax.jit(run).lower(q, k, k, flags))


def test_memory_grows_with_the_length_and_not_with_its_square():
    small, large = temporaries(2048, 512), temporaries(8192, 512)
    assert large < 4.4 * small  # four times the tokens
    assert temporaries(8192, 10**6) > 3 * large


@pytest.mark.slow
def test_temporaries_of_a_3b_prefill():
    """The compiler's count for a prefill at 224, 448 and 896 pixels.

    As a table: `pytest -m slow -s tests/model/test_long_context.py`.
    """
    from paligemma_jax.checkpoints.load import abstract_model
    from paligemma_jax.inference import generate
    from paligemma_jax.model.config import PaliGemmaConfig
    from paligemma_jax.model.stack import stack_layers

    sizes = {}
    for pixels in (224, 448, 896):
        model = abstract_model(PaliGemmaConfig.preset(f"3b-{pixels}"))
        stacked = jax.eval_shape(
            lambda model: (stack_layers(model.vision.layers), stack_layers(model.decoder.layers)),
            model,
        )
        model.vision.layers, model.decoder.layers = stacked
        size, patches = pixels, model.config.vision.num_patches
        T = patches + 32
        images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
        tokens, flags = jax.ShapeDtypeStruct((1, T), jnp.int32), jax.ShapeDtypeStruct((1, T), bool)
        features = jax.ShapeDtypeStruct((1, patches, 2304), jnp.float32)
        prefill = jax.jit(
            lambda model, tokens, features, flags, T=T: model.prefill(
                tokens, features, flags, flags, T + 32
            )
        )
        sizes[T] = (
            temp(generate.encode_images.lower(model, images)),
            temp(prefill.lower(model, tokens, features, flags)),
        )
        encoder, decoder = (size / 2**20 for size in sizes[T])
        print(f"{pixels} pixels, {T:5} tokens: {encoder:7.0f} MiB encoder, {decoder:7.0f} prefill")
    (small, _), (middle, decoder), (large, long) = (sizes[T] for T in sorted(sizes))
    assert small < middle and large < 4.4 * middle and long < 4.4 * decoder


def temp(lowered) -> int:
    return lowered.compile().memory_analysis().temp_size_in_bytes
