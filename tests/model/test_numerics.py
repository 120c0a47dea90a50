"""The differences between the numerics profiles, field by field, each against its own formula."""

from __future__ import annotations

from dataclasses import fields, replace

import jax.numpy as jnp
import numpy as np
import pytest
from support.decoding import prefill
from support.hf_models import hf_logits, random_inputs, save_checkpoint

from paligemma_jax.checkpoints.load import load_model
from paligemma_jax.inference import scoring
from paligemma_jax.model.config import NO_WINDOW, NUMERICS, Numerics
from paligemma_jax.model.layers import rope

ROWS = ((1, 5, 12),)


@pytest.fixture
def both(random_checkpoint):
    reference, directory, ours = random_checkpoint("pg2", 4)
    return (
        reference,
        ours,
        load_model(directory, numerics="big_vision"),
        random_inputs(reference, ROWS),
    )


def logits(model, inputs):
    return np.asarray(scoring.forward(model, inputs))


def test_every_row_is_tested():
    """A field added to `Numerics` needs a test here."""
    tested = {name.removeprefix("test_row_") for name in globals() if name.startswith("test_row_")}
    of_releases = {"scaled_features", "prefix_without_labels", "bidirectional_without_types"}
    assert tested | of_releases == {
        field.name for field in fields(Numerics)
    }  # tests/parity/engines
    ours, theirs = vars(NUMERICS["transformers"]), vars(NUMERICS["big_vision"])
    equal = {name for name in ours if ours[name] == theirs[name]}
    assert equal == of_releases | {"capped_decode", "head_dim_scale"}


def test_row_window(both):
    """Without its window (and its final cap) transformers' model gives big_vision's numbers."""
    reference, ours, theirs, inputs = both
    assert theirs.config.decoder.windows(theirs.config.profile) == (NO_WINDOW,) * 5
    assert ours.config.decoder.windows(ours.config.profile) == (8, NO_WINDOW, 8, NO_WINDOW, 8)
    cap = reference.config.text_config.final_logit_softcapping
    saved = list(reference.config.text_config.layer_types)
    try:
        reference.config.text_config.layer_types[:] = ["full_attention"] * 5
        expected = hf_logits(reference, inputs)
    finally:
        reference.config.text_config.layer_types[:] = saved
    actual = cap * np.tanh(logits(theirs, inputs) / cap)
    assert np.abs(actual - expected)[inputs.valid].max() < 2e-4
    assert np.abs(actual - logits(ours, inputs))[inputs.targets].max() > 0.1


def test_row_window_decode(both):
    """Generated tokens have transformers' window, as they have in one pass over all tokens."""
    reference, ours, theirs, _ = both
    windows = [model.config.decoder.windows(model.config.profile, True) for model in (ours, theirs)]
    assert windows == [(8, NO_WINDOW, 8, NO_WINDOW, 8), (NO_WINDOW,) * 5]
    short = random_inputs(reference, ((1, 5, 0),))
    for model in (ours, theirs):
        cache = prefill(model, short, 40)[1]
        step, _ = model.decode_step(jnp.array([7]), cache)
        longer = random_inputs(reference, ((1, 5, 1),))
        tokens = np.concatenate([short.tokens, [[7]]], 1).astype(np.int32)
        complete = logits(model, replace(longer, tokens=tokens))[:, -1]
        cap = 30 * np.tanh(complete / 30) if model is theirs else complete
        np.testing.assert_allclose(step, cap, atol=2e-4)


def test_row_capped_prefill(both):
    """transformers 5.23 caps teacher-forced logits and the first generated token's; big_vision does
    not."""
    _, ours, theirs, inputs = both
    short = replace(
        inputs,
        **{
            name: getattr(inputs, name)[:, :22] for name in ("tokens", "valid", "prefix", "targets")
        },
    )  # no window yet
    capped, free = logits(ours, short), logits(theirs, short)
    np.testing.assert_allclose(capped, 30 * np.tanh(free / 30), atol=2e-4)
    assert np.abs(capped - free).max() > 0.1
    first = [np.asarray(prefill(model, short, 24)[0]) for model in (ours, theirs)]
    np.testing.assert_allclose(first[0], 30 * np.tanh(first[1] / 30), atol=2e-4)


def test_row_capped_decode(both):
    """Both cap the later tokens' logits."""
    theirs = both[2]
    assert NUMERICS["transformers"].capped_decode and NUMERICS["big_vision"].capped_decode
    short = random_inputs(both[0], ((1, 5, 0),))
    _, cache = prefill(theirs, short, 40)
    token = jnp.array([7])
    capped, _ = theirs.decode_step(token, cache)
    longer = random_inputs(both[0], ((1, 5, 1),))
    longer = replace(longer, tokens=np.concatenate([short.tokens, [[7]]], 1).astype(np.int32))
    np.testing.assert_allclose(capped, 30 * np.tanh(logits(theirs, longer)[:, -1] / 30), atol=2e-4)


def test_row_first_position(both):
    """1 in transformers, 0 in big_vision; the results are equal in exact arithmetic."""
    _, ours, theirs, inputs = both
    for model, first in ((ours, 1), (theirs, 0)):
        span = prefill(model, inputs, 40)[1].span
        np.testing.assert_array_equal(
            span.positions[0, : inputs.tokens.shape[1]], np.arange(inputs.tokens.shape[1]) + first
        )


def test_rope_is_the_same():
    """Compares with big_vision's expression, restated from `models/ppp/gemma.py`. (For
    transformers, see tests/model/test_parity.py.)"""
    x = np.random.default_rng(0).normal(size=(1, 4400, 2, 256)).astype(np.float32)
    positions = jnp.arange(4400)[None]
    timescale = 10000.0 ** ((2.0 / 256) * jnp.arange(128, dtype=jnp.float32))
    radians = (positions[..., None] / timescale[None, None, :])[..., None, :]
    first, second = np.split(x, 2, axis=-1)
    expected = np.concatenate(
        [
            first * jnp.cos(radians) - second * jnp.sin(radians),
            second * jnp.cos(radians) + first * jnp.sin(radians),
        ],
        -1,
    )
    np.testing.assert_allclose(rope(jnp.asarray(x), positions, 10000.0), expected, atol=1e-6)


def test_row_scale_query(both):
    """Scaling queries instead of scores changes only the rounding."""
    _, ours, _, inputs = both
    profile = dict(NUMERICS)
    attention = [layer.attention for layer in ours.decoder.layers]
    expected = logits(ours, inputs)
    try:
        for layer in attention:
            layer.numerics = replace(profile["transformers"], scale_query=True)
        actual = logits(ours, inputs)
    finally:
        for layer in attention:
            layer.numerics = profile["transformers"]
    assert 0 < np.abs(actual - expected).max() < 2e-4


def test_row_head_dim_scale(both):
    """keras-hub divides scores by sqrt(head_dim), whatever the config says."""
    _, ours, _, inputs = both
    attention = [layer.attention for layer in ours.decoder.layers]
    config, numerics = attention[0].config, attention[0].numerics
    assert config.query_pre_attn_scalar != config.head_dim
    before = logits(ours, inputs)
    for layer in attention:
        layer.numerics = replace(numerics, head_dim_scale=True)
    actual = logits(ours, inputs)
    for layer in attention:
        layer.numerics = numerics
        layer.config = replace(config, query_pre_attn_scalar=config.head_dim)
    expected = logits(ours, inputs)
    for layer in attention:
        layer.config = config
    np.testing.assert_array_equal(actual, expected)
    assert np.abs(actual - before).max() > 0.01


def test_row_float32_activations(both, tmp_path):
    """big_vision computes in float32 for any parameter dtype."""
    import torch

    directory = save_checkpoint(both[0], tmp_path, dtype=torch.bfloat16)
    narrow, wide = (
        load_model(directory, "bfloat16", "big_vision"),
        load_model(directory, "float32", "big_vision"),
    )
    assert (
        narrow.config.activation_dtype == "float32"
        and load_model(directory, "bfloat16").config.activation_dtype == "bfloat16"
    )
    assert np.abs(logits(narrow, both[3]) - logits(wide, both[3])).max() < 2e-4
