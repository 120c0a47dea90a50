"""The training step: masks, losses, trainable and frozen parameters, optimizers."""

from __future__ import annotations

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.toys import TOY, batch

from paligemma_jax.bench.training import with_targets
from paligemma_jax.checkpoints.load import load_model
from paligemma_jax.checkpoints.source import TINY
from paligemma_jax.checkpoints.synthetic import (
    abstract_model_by_name,
    random_model,
    synthetic_inputs,
    with_depth,
)
from paligemma_jax.losses.tokens import cross_entropy
from paligemma_jax.model.config import PaliGemmaConfig
from paligemma_jax.model.stack import stack_model
from paligemma_jax.model.tree import parameters
from paligemma_jax.training.batches import Batch
from paligemma_jax.training.config import FinetuneConfig
from paligemma_jax.training.losses import answer_loss
from paligemma_jax.training.optimizers import make_optimizer, make_schedule
from paligemma_jax.training.prepare import prepare_model, trainer_shapes
from paligemma_jax.training.trainer import Trainer


def load_form(form):
    model = load_model(TINY)
    return stack_model(model) if form == "stack" else model


def toy_batch(model):
    return Batch(batch(model), np.ones(2, np.float32))


def train(trainer, batch, steps=1):
    """The state after some steps on one batch, and their losses."""
    state, losses = trainer.start(), []
    for _ in range(steps):
        state, report = trainer.step(state, trainer.frozen, batch, max_targets=8)
        losses.append(float(report["loss"]))
    return state, losses


def arguments(inputs):
    return inputs.tokens, inputs.images, inputs.valid, inputs.prefix


def test_a_gradient_that_is_not_finite_changes_nothing():
    """The loss is 0, but its gradient is infinite."""

    def loss(model, batch, max_targets):
        return jnp.sqrt(model["x"]).sum(), jnp.float32(1)

    trainer = Trainer({"x": jnp.zeros(3)}, replace(TOY, ema=0.5), 1, loss)
    state, report = trainer.step(trainer.start(), trainer.frozen, None, max_targets=0)
    assert float(report["loss"]) == 0 and not np.isfinite(report["gradient_norm"])
    assert not state.trainable["x"].any() and not state.average["x"].any() and int(state.step) == 0


def test_clipping_and_the_moving_average():
    """Compares with a computation by hand: norms above 2 are clipped to 2, the average decays by
    0.75."""

    def loss(model, batch, max_targets):
        return jnp.sum(model["x"] * batch), 2.0

    trainer = Trainer({"x": jnp.zeros(2)}, replace(TOY, clip=2.0, ema=0.75), 9, loss)
    state, x, average = trainer.start(), np.zeros(2), np.zeros(2)
    for gradient in ([0.3, 0.4], [30.0, 40.0], [0.0, 0.0], [-3.0, 4.0]):
        batch = jnp.array(gradient)
        state, report = trainer.step(state, trainer.frozen, batch, max_targets=0)
        norm = np.linalg.norm(gradient) / 2  # the loss is divided by 2
        x = x - 0.1 * np.array(gradient) / 2 * min(1, 2 / max(norm, 1e-9))
        average = 0.75 * average + 0.25 * x
        assert float(report["gradient_norm"]) == pytest.approx(norm)
        np.testing.assert_allclose(state.trainable["x"], x, atol=1e-6)
        np.testing.assert_allclose(state.average["x"], average, atol=1e-6)
    np.testing.assert_array_equal(trainer.result(state)["x"], state.average["x"])


@pytest.mark.parametrize("schedule,halfway", [("cosine", 0.5), ("linear", 0.5), ("constant", 1.0)])
@pytest.mark.parametrize("warmup", [5, 0.2])
def test_schedules(schedule, halfway, warmup):
    """Five of 25 steps of warmup, given as a number or a fraction, then decay to 0."""
    config = FinetuneConfig("", "", learning_rate=2.0, schedule=schedule, warmup=warmup)
    rate = make_schedule(config, 25)
    rates = [float(rate(step)) for step in range(6)]
    np.testing.assert_allclose(rates, [0.4, 0.8, 1.2, 1.6, 2.0, 2.0], rtol=1e-6)
    assert float(rate(15)) == pytest.approx(2 * halfway)
    assert float(rate(25)) == pytest.approx(2 * (halfway == 1), abs=1e-6)


def test_a_step_reports_its_learning_rate():
    config = replace(TOY, schedule="linear", learning_rate=1.0)
    trainer = Trainer({"x": jnp.ones(1)}, config, 4, lambda model, *_: (model["x"].sum(), 1.0))
    state, rates = trainer.start(), []
    for _ in range(4):
        state, report = trainer.step(state, trainer.frozen, None, max_targets=0)
        rates.append(float(report["learning_rate"]))
    np.testing.assert_allclose(rates, [1.0, 0.75, 0.5, 0.25])


@pytest.mark.parametrize(
    "pattern,form,expected",
    [
        ("decoder", "list", r"decoder/.*"),
        ("attention", "stack", r"decoder/layers/attention/.*"),
        ("attention", "list", r"decoder/layers/\d+/attention/.*"),
        ("projector", "stack", r"projector/.*"),
        (
            r"decoder/layers/[23]/.*|vision/.*/bias",
            "list",
            r"decoder/layers/[23]/.*|vision/.*/bias",
        ),
    ],
)
def test_only_matching_parameters_are_trained(pattern, form, expected):
    """The others are frozen and have no optimizer state."""
    model = load_form(form)
    trainer = Trainer(model, FinetuneConfig("", "", train=pattern), 1)
    matching = {path for path in parameters(model) if re.fullmatch(expected, path)}
    assert trainer.trainable and set(trainer.trainable) == matching
    assert trainer.frozen.keys() == parameters(model).keys() - matching
    state = jax.eval_shape(trainer.start)
    moments = [leaf for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim]
    trainable = sum(value.size for value in state.trainable.values())
    assert sum(m.size for m in moments) == 2 * trainable


def mean_loss(model, inputs):
    total, count = answer_loss(model, jax.tree.map(jnp.asarray, inputs), jnp.ones(2), 8)
    return total / count


def test_padding_changes_neither_loss_nor_gradient():
    """For any pad tokens, side and amount, logits agree to 1e-5 of the largest, gradients to 1e-4
    of their norm."""
    model = stack_model(load_model(TINY))

    @jax.jit
    def run(model, inputs):
        logits = model(*arguments(inputs))
        return logits, *jax.value_and_grad(mean_loss)(model, inputs)

    plain = batch(model)
    logits, loss, gradient = run(model, plain)
    expected = float(cross_entropy(logits, plain.tokens, plain.targets))
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    logits, gradient = np.asarray(logits)[plain.valid], parameters(gradient)
    for inputs in (
        batch(model, pad_token=9),
        batch(model, 5, "right"),
        batch(model, 11, "left", pad_token=7),
    ):
        padded_logits, padded_loss, padded_gradient = run(model, inputs)
        padded_logits = np.asarray(padded_logits)[inputs.valid]
        np.testing.assert_allclose(padded_logits, logits, atol=1e-5 * np.abs(logits).max())
        assert float(padded_loss) == pytest.approx(float(loss), rel=1e-5)
        for path, value in parameters(padded_gradient).items():
            expected = gradient[path]
            error = jnp.linalg.norm(value - expected)
            assert error <= 1e-4 * jnp.linalg.norm(expected) + 1e-6, path


@pytest.mark.parametrize("form", ["list", "stack"])
def test_a_suffix_token_does_not_change_earlier_logits(form):
    """They are equal bit for bit, for each suffix token; later logits do change."""
    model = load_form(form)
    inputs = batch(model)
    others = jax.tree.map(jnp.asarray, arguments(inputs)[1:])
    run = jax.jit(lambda model, tokens: model(tokens, *others))
    logits = np.asarray(run(model, inputs.tokens))
    for t in np.flatnonzero(inputs.targets[0]):
        tokens = inputs.tokens.copy()
        tokens[0, t] += 1
        change = np.abs(np.asarray(run(model, tokens)) - logits).max(axis=-1)
        assert not change[1].any() and not change[0, :t].any() and change[0, t:].all()


@pytest.mark.parametrize("reduction", ["tokens", "examples"])
def test_row_weights(reduction):
    """Weight 0 leaves a row out, weight 2 counts it twice, in the sum and in the divisor."""
    model = stack_model(load_model(TINY))

    @jax.jit
    def run(inputs, weights):
        return jnp.stack(answer_loss(model, inputs, weights, 8, reduction=reduction))

    def loss(weights, rows=(0, 1)):
        inputs = jax.tree.map(lambda a: a[np.array(rows)], batch(model))
        return np.asarray(run(inputs, jnp.array(weights)))

    np.testing.assert_allclose(loss([0.0, 1.0]), loss([0.0, 1.0], rows=(1, 1)), rtol=1e-6)
    expected = 2 * loss([1.0, 0.0]) + loss([0.0, 1.0])
    np.testing.assert_allclose(loss([2.0, 1.0]), expected, rtol=1e-6)
    assert loss([1.0, 0.0])[1] == (5 if reduction == "tokens" else 1)


def test_full_logits_never_exist():
    """Only the table, its gradient and its moments have the 3b vocabulary as an axis."""
    model = abstract_model_by_name("3b-224", "bfloat16", 1)
    trainer, state, frozen = trainer_shapes(
        model, FinetuneConfig("", "", batch_size=2, dtype="bfloat16")
    )
    inputs = with_targets(synthetic_inputs(model.config, 2, 40), 20)
    data = Batch(inputs, np.ones(2, np.float32))
    program = trainer.step.lower(state, frozen, data, max_targets=32).as_text()
    shapes = re.findall(r"tensor<((?:\d+x)*257216(?:x\d+)*)x\w+>", program)
    assert set(shapes) == {"257216x2304"}
    # An eighth of the vocabulary, at the targets.
    assert re.search(r"tensor<2x32x32152xf32>", program)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.thorough
def test_stacking_and_remat_do_not_change_a_step(dropout):
    config = replace(TOY, batch_size=2, learning_rate=1.0, dropout=dropout)
    tables = []
    for form, remat in (
        ("list", "none"),
        ("stack", "none"),
        ("stack", "full"),
        ("stack", "outputs"),
        ("list", "dots"),
    ):
        model = random_model(with_depth(PaliGemmaConfig.preset("tiny"), 2))
        data = toy_batch(model)
        model = stack_model(model) if form == "stack" else model
        state, _ = train(Trainer(model, replace(config, remat=remat), 1), data)
        tables.append(state.trainable["decoder/embedder/table"])
    for table in tables[1:]:
        np.testing.assert_allclose(table, tables[0], atol=2e-5)


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "sgd", "muon"])
@pytest.mark.parametrize("form", ["list", "stack"])
@pytest.mark.thorough
def test_every_optimizer_lowers_the_loss(optimizer, form):
    config = FinetuneConfig(
        "",
        "",
        batch_size=2,
        optimizer=optimizer,
        learning_rate={"sgd": 1e-1, "muon": 1e-2}.get(optimizer, 1e-3),
        weight_decay=0.01,
        train="decoder",
    )
    model = load_form(form)
    _, losses = train(Trainer(model, config, 12), toy_batch(model), 12)
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "sgd", "muon"])
def test_weight_decay_is_scaled_by_the_learning_rate(optimizer):
    """With a gradient of 0, in the first of two warmup steps, the update is half the rate times the
    decay for matrices, and zero for norms and biases."""
    config = replace(TOY, optimizer=optimizer, learning_rate=0.1, weight_decay=0.5, warmup=2)
    transformation = make_optimizer(config, 4)
    shapes = {"kernel": (4, 4), "scale": 4, "bias": 4}
    layer = "decoder/layers/0/mlp/up"
    weights = {f"{layer}/{name}": jnp.ones(shape) for name, shape in shapes.items()}
    gradient = jax.tree.map(jnp.zeros_like, weights)
    updates, _ = transformation.update(gradient, transformation.init(weights), weights)
    for path, update in updates.items():
        expected = -0.05 * 0.5 if path.endswith("kernel") else 0
        np.testing.assert_allclose(update, expected, rtol=1e-6)


@pytest.mark.thorough
def test_vision_rate_scales_the_updates_of_the_encoder():
    model = load_model(TINY)
    config = FinetuneConfig(
        "", "", batch_size=2, warmup=0, learning_rate=1e-3, vision_rate=0.1, clip=0
    )
    state, _ = train(Trainer(model, config, 10), toy_batch(model))
    before = parameters(model)
    for tower, expected in (("decoder", 1e-3), ("vision", 1e-4)):
        path = f"{tower}/layers/0/mlp/up/kernel"
        change = float(jnp.abs(state.trainable[path] - before[path]).max())
        assert change == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(
    "train_name,quantized", [("all", None), ("decoder", None), ("lora", None), ("lora", "nf4")]
)
@pytest.mark.thorough
def test_frozen_parameters_stay_bfloat16_and_trainable_ones_are_float32(train_name, quantized):
    config = FinetuneConfig(
        "",
        "",
        train=train_name,
        quantize=quantized,
        dtype="bfloat16",
        lora_rank=2,
        batch_size=2,
        learning_rate=1e-3,
    )

    def is_trainable(path):
        return bool(re.fullmatch(config.trainable_pattern, path))

    model = load_model(TINY, "bfloat16", keep_float32=is_trainable, quantize=quantized)
    trainer = Trainer(prepare_model(model, config), config, 4)
    state, losses = train(trainer, toy_batch(load_model(TINY)), 4)
    assert losses[-1] < losses[0]
    assert {value.dtype.name for value in state.trainable.values()} == {"float32"}
    dtypes = {path: value.dtype.name for path, value in trainer.frozen.items()}
    weights = {dtypes[path] for path in dtypes if not path.endswith(("codes", "/scale"))}
    assert weights == (set() if train_name == "all" else {"bfloat16"})
    codes = {dtypes[path] for path in dtypes if path.endswith("codes")}
    assert codes == ({"uint8"} if quantized else set())
