"""Training against torch in float32: the loss, the gradient of every parameter, ten steps of AdamW."""

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


def our_loss(model, inputs, max_targets=12, **options):
    total, count = answer_loss(model, jax.tree.map(jnp.asarray, inputs), jnp.ones(len(inputs.tokens)), max_targets, **options)
    return total / count


def as_ours(reference, directory, values):
    """These torch values in the place of the parameters, under our paths and in our layouts."""
    model = copy.deepcopy(reference)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(values[name])
    return {path: np.asarray(a) for path, a in parameters(load_model(save_checkpoint(model, directory))).items()}


@pytest.mark.parametrize("kind,side", [("pg2", "right"), ("pg2", "left"), ("pg1", "right")])
def test_loss_and_every_gradient(random_checkpoint, tmp_path, kind, side):
    reference, _, model = random_checkpoint(kind, 0)
    inputs = random_inputs(reference, ROWS, 0, side)
    theirs = copy.deepcopy(reference)
    expected = torch_loss(theirs, inputs)
    expected.backward()
    loss, gradients = jax.value_and_grad(our_loss)(model, inputs)
    assert float(loss) == pytest.approx(expected.item(), rel=1e-5)
    wanted = as_ours(reference, tmp_path, {name: parameter.grad for name, parameter in theirs.named_parameters()})
    for path, found in parameters(gradients).items():
        if path.endswith("attention/k/bias"):  # its gradient is zero but for rounding: softmax does not see what all keys share
            assert np.abs(found).max() < 1e-4
            continue
        assert np.linalg.norm(found - wanted[path]) <= 1e-4 * np.linalg.norm(wanted[path]), path


def test_loss_reductions(random_checkpoint):
    """By default that of transformers; "examples" is the mean of each row's mean, as in big_vision."""
    reference, _, model = random_checkpoint("pg2", 0)
    inputs = random_inputs(reference, ROWS, 0)
    with torch.no_grad():
        whole = torch_loss(reference, inputs).item()
        each = [torch_loss(reference, jax.tree.map(lambda a, i=i: a[i : i + 1], inputs)).item() for i in range(len(ROWS))]
    assert abs(np.mean(each) - whole) > 1e-2  # else the two could be swapped unseen
    for reduction, expected in (("tokens", whole), ("examples", np.mean(each))):
        assert float(our_loss(model, inputs, reduction=reduction)) == pytest.approx(expected, rel=1e-5)


def test_label_smoothing(random_checkpoint):
    reference, _, model = random_checkpoint("pg2", 0)
    inputs = random_inputs(reference, ROWS, 0)
    assert float(our_loss(model, inputs, smoothing=0.1)) == pytest.approx(torch_loss(reference, inputs, 0.1).item(), rel=1e-5)


def test_ten_steps_of_adamw(random_checkpoint, tmp_path):
    reference, _, model = random_checkpoint("pg2", 0)
    theirs = copy.deepcopy(reference)
    decayed = [p for name, p in theirs.named_parameters() if "norm" not in name and not name.endswith("bias")]
    others = [p for name, p in theirs.named_parameters() if "norm" in name or name.endswith("bias")]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}], lr=1e-3)
    trainer = Trainer(model, PLAIN, 10)
    state = trainer.start()
    for step in range(10):
        inputs = random_inputs(reference, ROWS, step, "right")
        loss = torch_loss(theirs, inputs)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        state, report = trainer.step(state, trainer.frozen, Batch(inputs, np.ones(4, np.float32)), max_targets=12)
        assert float(report["loss"]) == pytest.approx(loss.item(), rel=1e-3)
    wanted = as_ours(reference, tmp_path, dict(theirs.named_parameters()))
    start = parameters(model)
    for path, found in state.trainable.items():
        if not path.endswith("attention/k/bias"):  # Adam makes steps of full size of what is rounding there
            moved, apart = np.linalg.norm(wanted[path] - start[path]), np.linalg.norm(found - wanted[path])
            assert apart < 1e-2 * moved and apart / found.size**0.5 < 1e-4, (path, np.abs(found - wanted[path]).max())


def test_accumulation_is_the_whole_batch(random_checkpoint):
    reference, _, model = random_checkpoint("pg2", 0)
    data = Batch(random_inputs(reference, ROWS, 0, "right"), np.array([1, 1, 0.5, 2], np.float32))
    for reduction in ("tokens", "examples"):
        found = []
        for parts in (1, 4):
            trainer = Trainer(model, replace(PLAIN, accumulate=parts, reduction=reduction, optimizer="sgd", beta1=0.0), 1)
            state, report = trainer.step(trainer.start(), trainer.frozen, data, max_targets=12)
            found.append((float(report["loss"]), state.trainable))
        assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
        for path, value in found[0][1].items():
            np.testing.assert_allclose(value, found[1][1][path], atol=1e-6, err_msg=path)
