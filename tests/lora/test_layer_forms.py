"""DoRA and rsLoRA of some layers: a list of layers and a stack train the same adapter."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from support.on_devices import make_batch, small_config

from paligemma_jax import lora
from paligemma_jax.checkpoints.synthetic import random_model
from paligemma_jax.model.stack import stack_model
from paligemma_jax.training.batches import max_targets
from paligemma_jax.training.config import FinetuneConfig
from paligemma_jax.training.prepare import prepare_model
from paligemma_jax.training.trainer import Trainer

TARGETS = [
    r"decoder/layers/attention/[qv]",  # without the number of a layer
    r"decoder/layers/\d+/mlp/(up|down)|vision/layers/\d/attention/q",
    r".*/[ko]|projector",
]


def train(model, config, batch):
    """The losses of three steps, and the adapter after them."""
    trainer = Trainer(model, config, 3)
    state, losses = trainer.start(), []
    for _ in range(3):
        state, report = trainer.step(state, trainer.frozen, batch, max_targets=max_targets(batch))
        losses.append(float(report["loss"]))
    return losses, lora.lora_factors(trainer.result(state))


@pytest.mark.parametrize(
    ("target", "form"),
    [*((target, dict(dora=True)) for target in TARGETS), (TARGETS[1], dict(rslora=True))],
)
@pytest.mark.thorough
def test_a_list_and_a_stack_train_the_same_adapter(target, form):
    """From the same factors; those that each form starts with have the same paths and shapes, and
    the same magnitudes."""
    model_config = small_config("pg2", layers=2)
    model, batch = random_model(model_config), make_batch(model_config, 4)
    options = dict(lora_rank=4, lora_vision_rank=2, lora_target=target, schedule="constant")
    config = FinetuneConfig("", "", train="lora", learning_rate=1e-2, warmup=0, **options, **form)
    listed = prepare_model(model, replace(config, layers="list"))
    own = lora.lora_factors(prepare_model(model, config))
    first = lora.lora_factors(listed)
    assert {path: f.a.shape for path, f in own.items()} == {
        path: f.a.shape for path, f in first.items()
    }
    for path, f in first.items() if form.get("dora") else ():
        np.testing.assert_allclose(own[path].magnitude, f.magnitude, rtol=1e-6, err_msg=path)
    stacked = train(stack_model(listed, delete=False), config, batch)
    losses, factors = train(listed, replace(config, layers="list"), batch)
    assert losses[-1] < losses[0]
    np.testing.assert_allclose(stacked[0], losses, rtol=1e-5)
    assert stacked[1].keys() == factors.keys() == first.keys()
    for path, f in factors.items():
        other = stacked[1][path]
        assert other.scale == f.scale == own[path].scale
        assert np.abs(f.b).max() > 0
        for ours, theirs in ((f.a, other.a), (f.b, other.b), (f.magnitude, other.magnitude)):
            if ours is not None:
                np.testing.assert_allclose(ours, theirs, atol=1e-5, err_msg=path)
