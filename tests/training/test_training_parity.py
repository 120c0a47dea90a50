"""Training against torch in float32: the loss, the gradient of every parameter, steps of AdamW."""

from __future__ import annotations

import copy
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from support.hf_models import random_inputs, save_checkpoint
from support.torch_training import PLAIN, ROWS, torch_loss

from paligemma_jax.checkpoints.load import load_model
from paligemma_jax.model.tree import parameters
from paligemma_jax.training.batches import Batch
from paligemma_jax.training.losses import answer_loss
from paligemma_jax.training.trainer import Trainer


def jax_loss(model, inputs, max_targets=12, **options):
    inputs, weights = jax.tree.map(jnp.asarray, inputs), jnp.ones(len(inputs.tokens))
    total, count = answer_loss(model, inputs, weights, max_targets, **options)
    return total / count


def to_jax(reference, directory, values):
    """Torch values by the paths and in the layouts of our parameters."""
    model = copy.deepcopy(reference)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(values[name])
    loaded = parameters(load_model(save_checkpoint(model, directory)))
    return {path: np.asarray(array) for path, array in loaded.items()}


@pytest.mark.parametrize("kind,side", [("pg2", "right"), ("pg2", "left"), ("pg1", "right")])
def test_loss_and_every_gradient(random_checkpoint, tmp_path, kind, side):
    reference, _, model = random_checkpoint(kind, 0)
    inputs = random_inputs(reference, ROWS, 0, side)
    torch_model = copy.deepcopy(reference)
    expected = torch_loss(torch_model, inputs)
    expected.backward()
    loss, gradients = jax.value_and_grad(jax_loss)(model, inputs)
    assert float(loss) == pytest.approx(expected.item(), rel=1e-5)
    grads = {name: parameter.grad for name, parameter in torch_model.named_parameters()}
    references = to_jax(reference, tmp_path, grads)
    for path, gradient in parameters(gradients).items():
        if path.endswith("attention/k/bias"):
            # Zero up to rounding: softmax ignores what all keys share.
            assert np.abs(gradient).max() < 1e-4
            continue
        error = np.linalg.norm(gradient - references[path])
        assert error <= 1e-4 * np.linalg.norm(references[path]), path


def test_loss_reductions(random_checkpoint):
    """The default is as in transformers; "examples" is the mean of each row's mean (big_vision)."""
    reference, _, model = random_checkpoint("pg2", 0)
    inputs = random_inputs(reference, ROWS, 0)
    rows = [jax.tree.map(lambda a, i=i: a[i : i + 1], inputs) for i in range(len(ROWS))]
    with torch.no_grad():
        over_tokens = torch_loss(reference, inputs).item()
        over_examples = np.mean([torch_loss(reference, row).item() for row in rows])
    assert abs(over_examples - over_tokens) > 1e-2  # otherwise the test could not tell them apart
    for reduction, expected in (("tokens", over_tokens), ("examples", over_examples)):
        loss = float(jax_loss(model, inputs, reduction=reduction))
        assert loss == pytest.approx(expected, rel=1e-5)


def test_label_smoothing(random_checkpoint):
    reference, _, model = random_checkpoint("pg2", 0)
    inputs = random_inputs(reference, ROWS, 0)
    expected = torch_loss(reference, inputs, 0.1).item()
    assert float(jax_loss(model, inputs, smoothing=0.1)) == pytest.approx(expected, rel=1e-5)


def test_ten_steps_of_adamw(random_checkpoint, tmp_path):
    reference, _, model = random_checkpoint("pg2", 0)
    torch_model = copy.deepcopy(reference)
    groups = {True: [], False: []}
    for name, parameter in torch_model.named_parameters():
        groups["norm" in name or name.endswith("bias")].append(parameter)
    optimizer = torch.optim.AdamW(
        [
            {"params": groups[False], "weight_decay": 0.01},
            {"params": groups[True], "weight_decay": 0.0},
        ],
        lr=1e-3,
    )
    trainer = Trainer(model, PLAIN, 10)
    state = trainer.start()
    for step in range(10):
        inputs = random_inputs(reference, ROWS, step, "right")
        loss = torch_loss(torch_model, inputs)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        batch = Batch(inputs, np.ones(4, np.float32))
        state, report = trainer.step(state, trainer.frozen, batch, max_targets=12)
        assert float(report["loss"]) == pytest.approx(loss.item(), rel=1e-3)
    references = to_jax(reference, tmp_path, dict(torch_model.named_parameters()))
    start = parameters(model)
    for path, value in state.trainable.items():
        if path.endswith("attention/k/bias"):
            continue  # its gradient is rounding noise, which Adam turns into full steps
        moved = np.linalg.norm(references[path] - start[path])
        error = np.linalg.norm(value - references[path])
        assert error < 1e-2 * moved and error / value.size**0.5 < 1e-4, path


def test_accumulating_parts_equals_the_full_batch(random_checkpoint):
    reference, _, model = random_checkpoint("pg2", 0)
    inputs = random_inputs(reference, ROWS, 0, "right")
    batch = Batch(inputs, np.array([1, 1, 0.5, 2], np.float32))
    for reduction in ("tokens", "examples"):
        losses, results = [], []
        for parts in (1, 4):
            config = replace(
                PLAIN, accumulate=parts, reduction=reduction, optimizer="sgd", beta1=0.0
            )
            trainer = Trainer(model, config, 1)
            state, report = trainer.step(trainer.start(), trainer.frozen, batch, max_targets=12)
            losses.append(float(report["loss"]))
            results.append(state.trainable)
        assert losses[0] == pytest.approx(losses[1], rel=1e-6)
        for path, value in results[0].items():
            np.testing.assert_allclose(value, results[1][path], atol=1e-6, err_msg=path)
