"""Dropout in the decoder: what is dropped, and where it does not apply."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.toys import TOY, batch

from paligemma_jax.checkpoints.load import load_model
from paligemma_jax.checkpoints.source import TINY
from paligemma_jax.model.dropout import decoder_dropout
from paligemma_jax.model.stages import collect_stages
from paligemma_jax.training.batches import Batch
from paligemma_jax.training.trainer import Trainer

RATE = 0.25
BRANCHES = [f"decoder/layers/{i}/{name}/output" for i in range(4) for name in ("attention", "mlp")]


@pytest.fixture(scope="module")
def model():
    return load_model(TINY)


def branches(model, rate):
    """What every branch of every layer adds to the residual stream."""
    inputs = jax.tree.map(jnp.asarray, batch(model))
    with decoder_dropout(rate, jax.random.key(0)), collect_stages(branches=True) as stages:
        model(inputs.tokens, inputs.images, inputs.valid, inputs.prefix)
    return {name: np.asarray(stages[name]) for name in BRANCHES}


def test_every_branch_is_dropped_by_itself(model):
    """A quarter of each output is zero, to within 6 standard deviations, and no two outputs are
    zero at the same places."""
    kept = [value != 0 for value in branches(model, RATE).values()]
    deviation = (RATE * (1 - RATE) / kept[0].size) ** 0.5
    for i, mask in enumerate(kept):
        assert abs((~mask).mean() - RATE) < 6 * deviation
        for other in kept[:i]:
            assert abs((mask ^ other).mean() - 2 * RATE * (1 - RATE)) < 0.05


def test_attention_is_dropped_after_its_norm_and_the_mlp_before(model):
    """As in big_vision. What is left of attention grows by 1 / (1 - rate). The norm after the MLP
    undoes that: it makes the mean square of every token 1."""
    plain, dropped = branches(model, 0.0), branches(model, RATE)
    first, mlp = BRANCHES[:2]
    kept = dropped[first] != 0
    np.testing.assert_allclose(dropped[first][kept], plain[first][kept] / (1 - RATE), rtol=1e-6)
    scale = 1 + model.decoder.layers[0].post_mlp_norm.scale[...]
    np.testing.assert_allclose(np.mean((dropped[mlp] / scale) ** 2, axis=-1), 1, atol=1e-3)


def test_steps_differ_and_validation_is_without_dropout(model):
    data = Batch(batch(model), np.ones(2, np.float32))
    config = replace(TOY, train="projector", learning_rate=1e-30)
    plain, trainer = (Trainer(model, replace(config, dropout=rate), 3) for rate in (0.0, RATE))
    state = trainer.start()
    validated = trainer.losses(state.trainable, trainer.frozen, data, max_targets=8)
    expected = plain.losses(state.trainable, trainer.frozen, data, max_targets=8)
    np.testing.assert_array_equal(np.stack(validated), np.stack(expected))
    losses = {float(validated[0] / validated[1])}
    for _ in range(3):
        state, report = trainer.step(state, trainer.frozen, data, max_targets=8)
        losses.add(float(report["loss"]))
    assert len(losses) == 4


def test_without_a_rate_the_program_is_the_same(model):
    inputs = jax.tree.map(jnp.asarray, batch(model))
    arguments = inputs.tokens, inputs.images, inputs.valid, inputs.prefix
    key = jax.random.key(0)

    def program(rate):
        with decoder_dropout(rate, key):
            return str(jax.make_jaxpr(lambda *arguments: model(*arguments))(*arguments))

    plain = str(jax.make_jaxpr(lambda *arguments: model(*arguments))(*arguments))
    assert program(0.0) == plain != program(RATE)
