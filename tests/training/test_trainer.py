"""One step of training: who sees whom, what counts, what learns, and what changes nothing."""

from __future__ import annotations

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.toys import TOY, batch

from paligemma_jax.bench.training import answering
from paligemma_jax.checkpoints.load import load_model
from paligemma_jax.checkpoints.source import TINY
from paligemma_jax.checkpoints.synthetic import (
    abstract_model_by_name,
    random_model,
    synthetic_inputs,
    with_depth,
)
from paligemma_jax.model.config import PaliGemmaConfig
from paligemma_jax.model.stack import stack_model
from paligemma_jax.model.tree import parameters
from paligemma_jax.training.batches import Batch
from paligemma_jax.training.config import FinetuneConfig
from paligemma_jax.training.losses import answer_loss, token_loss
from paligemma_jax.training.optimizers import make_optimizer, make_schedule
from paligemma_jax.training.prepare import prepare_model, trainer_shapes
from paligemma_jax.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("quick_to_compile")



def test_a_gradient_that_is_no_number_changes_nothing():
    """The loss is 0, its gradient infinite: the weights stay, and the report tells."""
    trainer = Trainer({"x": jnp.zeros(3)}, replace(TOY, ema=0.5), 1, loss=lambda model, batch, max_targets: (jnp.sqrt(model["x"]).sum(), jnp.float32(1)))
    state, report = trainer.step(trainer.start(), trainer.frozen, None, max_targets=0)
    assert float(report["loss"]) == 0 and not np.isfinite(report["gradient_norm"])
    assert not state.trainable["x"].any() and not state.average["x"].any() and int(state.step) == 0


def test_clipping_and_the_average():
    """By hand: gradients longer than 2 are cut to 2, and the average follows at a quarter of the way."""
    trainer = Trainer({"x": jnp.zeros(2)}, replace(TOY, clip=2.0, ema=0.75), 9, loss=lambda model, batch, max_targets: (jnp.sum(model["x"] * batch), 2.0))
    state, x, average = trainer.start(), np.zeros(2), np.zeros(2)
    for gradient in ([0.3, 0.4], [30.0, 40.0], [0.0, 0.0], [-3.0, 4.0]):
        state, report = trainer.step(state, trainer.frozen, jnp.array(gradient), max_targets=0)
        norm = np.linalg.norm(gradient) / 2  # the loss is divided by 2
        x = x - 0.1 * np.array(gradient) / 2 * min(1, 2 / max(norm, 1e-9))
        average = 0.75 * average + 0.25 * x
        assert float(report["gradient_norm"]) == pytest.approx(norm)
        np.testing.assert_allclose(state.trainable["x"], x, atol=1e-6)
        np.testing.assert_allclose(state.average["x"], average, atol=1e-6)
    np.testing.assert_array_equal(trainer.result(state)["x"], state.average["x"])


@pytest.mark.parametrize("schedule,half", [("cosine", 0.5), ("linear", 0.5), ("constant", 1.0)])
def test_schedules(schedule, half):
    """Up from a fifth in five steps, given as a number or as a part, then down to 0 after the last."""
    for warmup in (5, 0.2):
        rate = make_schedule(FinetuneConfig("", "", learning_rate=2.0, schedule=schedule, warmup=warmup), 25)
        np.testing.assert_allclose([float(rate(step)) for step in range(6)], [0.4, 0.8, 1.2, 1.6, 2.0, 2.0], rtol=1e-6)
        assert float(rate(15)) == pytest.approx(2 * half) and float(rate(25)) == pytest.approx(2 * (half == 1), abs=1e-6)


@pytest.mark.parametrize(
    "train,form,expected",
    [
        ("decoder", "list", lambda path: path.startswith("decoder/")),
        ("attention", "stack", lambda path: path.startswith("decoder/layers/attention/")),
        ("attention", "list", lambda path: path.startswith("decoder/layers/") and path.split("/")[3] == "attention"),
        ("projector", "stack", lambda path: path.startswith("projector/")),
        (r"decoder/layers/[23]/.*|vision/.*/bias", "list", lambda path: re.match(r"decoder/layers/[23]/|vision/.*/bias$", path)),
    ],
)
def test_what_trains(train, form, expected):
    """The rest is frozen, and the optimizer holds nothing of it."""
    model = load_model(TINY)
    trainer = Trainer(stack_model(model) if form == "stack" else model, FinetuneConfig("", "", train=train), 1)
    assert trainer.trainable and set(trainer.trainable) == {path for path in trainer.frozen | dict.fromkeys(trainer.trainable) if expected(path)}
    state = jax.eval_shape(trainer.start)
    moments = [leaf for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim]
    assert sum(m.size for m in moments) == 2 * sum(value.size for value in state.trainable.values())




def loss_of(model, inputs):
    total, count = answer_loss(model, jax.tree.map(jnp.asarray, inputs), jnp.ones(2), 8)
    return total / count


def test_padding_moves_neither_loss_nor_gradient():
    """Its tokens, its side, its amount: logits to 1e-5 of the largest, gradients to 1e-4 of their norm."""
    model = stack_model(load_model(TINY))
    run = jax.jit(lambda model, inputs: (model(*_called(inputs)), *jax.value_and_grad(loss_of)(model, inputs)))
    plain = batch(model)
    logits, loss, gradient = run(model, plain)
    assert float(loss) == pytest.approx(float(token_loss(logits, plain.tokens, plain.targets)), rel=1e-5)
    logits, gradient = np.asarray(logits)[plain.valid], parameters(gradient)
    for inputs in (batch(model, fill=9), batch(model, 5, "right"), batch(model, 11, "left", fill=7)):
        other, moved_loss, moved = run(model, inputs)
        np.testing.assert_allclose(np.asarray(other)[inputs.valid], logits, atol=1e-5 * np.abs(logits).max())
        assert float(moved_loss) == pytest.approx(float(loss), rel=1e-5)
        for path, value in parameters(moved).items():
            wanted = gradient[path]
            assert jnp.linalg.norm(value - wanted) <= 1e-4 * jnp.linalg.norm(wanted) + 1e-6, path


@pytest.mark.parametrize("form", [lambda model: model, stack_model], ids=["list", "stack"])
def test_a_suffix_token_moves_no_logits_before_it(form):
    """To the bit, for each of them; and it does move those that come after."""
    model = form(load_model(TINY))
    inputs = batch(model)
    run = jax.jit(lambda model, tokens: model(tokens, *_called(inputs)[1:]))
    logits = np.asarray(run(model, inputs.tokens))
    for t in np.flatnonzero(inputs.targets[0]):
        tokens = inputs.tokens.copy()
        tokens[0, t] += 1
        moved = np.abs(np.asarray(run(model, tokens)) - logits).max(axis=-1)
        assert not moved[1].any() and not moved[0, :t].any() and moved[0, t:].all()


@pytest.mark.parametrize("reduction", ["tokens", "examples"])
def test_the_weight_of_a_row(reduction):
    """0 leaves it out, 2 counts it twice, in the loss and in what it is divided by."""
    model = stack_model(load_model(TINY))
    run = jax.jit(lambda inputs, weights: jnp.stack(answer_loss(model, inputs, weights, 8, reduction=reduction)))
    loss = lambda weights, rows=(0, 1): np.asarray(run(jax.tree.map(lambda a: a[np.array(rows)], batch(model)), jnp.array(weights)))
    np.testing.assert_allclose(loss([0.0, 1.0]), loss([0.0, 1.0], rows=(1, 1)), rtol=1e-6)
    np.testing.assert_allclose(loss([2.0, 1.0]), 2 * loss([1.0, 0.0]) + loss([0.0, 1.0]), rtol=1e-6)
    assert loss([1.0, 0.0])[1] == (5 if reduction == "tokens" else 1)


def test_the_logits_of_a_batch_never_exist():
    """In a step of the 3b's vocabulary nothing has it whole for an axis but the table, its gradient and its moments."""
    model = abstract_model_by_name("3b-224", "bfloat16", 1)
    config = FinetuneConfig("", "", batch_size=2, dtype="bfloat16")
    trainer, state, frozen = trainer_shapes(model, config)
    inputs = answering(synthetic_inputs(model.config, 2, 40), 20)
    program = trainer.step.lower(state, frozen, Batch(inputs, np.ones(2, np.float32)), max_targets=32).as_text()
    assert set(re.findall(r"tensor<((?:\d+x)*257216(?:x\d+)*)x\w+>", program)) == {"257216x2304"}
    assert re.search(r"tensor<2x32x32152xf32>", program)  # an eighth of the vocabulary, at the answers' places


def _called(inputs):
    return inputs.tokens, inputs.images, inputs.valid, inputs.prefix


def test_layers_and_remat_change_nothing():
    """One step with stacked layers and with either remat equals the plain one."""
    found = {}
    for form, remat in (("list", "none"), ("stack", "none"), ("stack", "full"), ("list", "dots")):
        model = random_model(with_depth(PaliGemmaConfig.preset("tiny"), 2))
        config = FinetuneConfig("", "", batch_size=2, warmup=0, learning_rate=1.0, optimizer="sgd", clip=0, beta1=0, remat=remat)
        trainer = Trainer(stack_model(model) if form == "stack" else model, config, 1)
        data = Batch(batch(model), np.ones(2, np.float32))
        state, _ = trainer.step(trainer.start(), trainer.frozen, data, max_targets=8)
        found[form, remat] = state.trainable["decoder/embedder/table"]
    for value in found.values():
        np.testing.assert_allclose(value, found["list", "none"], atol=2e-5)


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "sgd", "muon"])
@pytest.mark.parametrize("form", ["list", "stack"])
def test_every_optimizer_learns(optimizer, form):
    model = load_model(TINY)
    rate = {"sgd": 1e-1, "muon": 1e-2}.get(optimizer, 1e-3)
    config = FinetuneConfig("", "", batch_size=2, optimizer=optimizer, learning_rate=rate, weight_decay=0.01, train="decoder")
    trainer = Trainer(stack_model(model) if form == "stack" else model, config, 12)
    state, data, seen = trainer.start(), Batch(batch(model), np.ones(2, np.float32)), []
    for _ in range(12):
        state, report = trainer.step(state, trainer.frozen, data, max_targets=8)
        seen.append(float(report["loss"]))
    assert seen[-1] < 0.8 * seen[0]


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "sgd", "muon"])
def test_weights_decay_at_the_learning_rate(optimizer):
    """Without a gradient, in the first of two steps of warm-up: matrices by half the rate times the decay, norms and biases not."""
    rule = make_optimizer(replace(TOY, optimizer=optimizer, learning_rate=0.1, weight_decay=0.5, warmup=2), 4)
    weights = {f"decoder/layers/0/mlp/up/{name}": jnp.ones(shape) for name, shape in {"kernel": (4, 4), "scale": 4, "bias": 4}.items()}
    updates, _ = rule.update(jax.tree.map(jnp.zeros_like, weights), rule.init(weights), weights)
    for path, update in updates.items():
        np.testing.assert_allclose(update, -0.05 * 0.5 if path.endswith("kernel") else 0, rtol=1e-6)


def test_the_encoder_learns_at_its_own_rate():
    model = load_model(TINY)
    config = FinetuneConfig("", "", batch_size=2, warmup=0, learning_rate=1e-3, vision_rate=0.1, clip=0)
    trainer = Trainer(model, config, 10)
    state, _ = trainer.step(trainer.start(), trainer.frozen, Batch(batch(model), np.ones(2, np.float32)), max_targets=8)
    moved = {path: float(jnp.abs(value - parameters(model)[path]).max()) for path, value in state.trainable.items()}
    assert moved["decoder/layers/0/mlp/up/kernel"] == pytest.approx(1e-3, rel=0.01)
    assert moved["vision/layers/0/mlp/up/kernel"] == pytest.approx(1e-4, rel=0.01)


@pytest.mark.parametrize("train,quantized", [("all", None), ("decoder", None), ("lora", None), ("lora", "nf4")])
def test_in_bfloat16_what_is_frozen_stays_so_and_what_learns_is_float32(train, quantized):
    config = FinetuneConfig("", "", train=train, quantize=quantized, dtype="bfloat16", lora_rank=2, batch_size=2, learning_rate=1e-3)
    wide = lambda path: bool(re.fullmatch(config.pattern, path))
    trainer = Trainer(prepare_model(load_model(TINY, "bfloat16", keep_float32=wide, quantize=quantized), config), config, 4)
    state, found = trainer.start(), []
    for _ in range(4):
        state, report = trainer.step(state, trainer.frozen, Batch(batch(load_model(TINY)), np.ones(2, np.float32)), max_targets=8)
        found.append(float(report["loss"]))
    assert found[-1] < found[0]
    assert {value.dtype.name for value in state.trainable.values()} == {"float32"}
    kept = {value.dtype.name for path, value in trainer.frozen.items() if not path.endswith(("codes", "/scale"))}
    assert kept == (set() if train == "all" else {"bfloat16"})
    assert {value.dtype.name for path, value in trainer.frozen.items() if path.endswith("codes")} == ({"uint8"} if quantized else set())
