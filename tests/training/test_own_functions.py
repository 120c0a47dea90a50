"""Losses, optimizers, callbacks, metrics and loggers of the user's own."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from functools import partial
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.finetuning import assert_equal, losses, read_log, small_config, weights
from support.toys import TOY, batch

import paligemma_jax as pg
from paligemma_jax.checkpoints.load import load_model
from paligemma_jax.checkpoints.source import TINY
from paligemma_jax.losses.tokens import cross_entropy
from paligemma_jax.training.batches import Batch
from paligemma_jax.training.checkpointing import Checkpoints
from paligemma_jax.training.config import FinetuneConfig
from paligemma_jax.training.loss_function import make_loss
from paligemma_jax.training.measures import Criterion, check_measures, make_measures
from paligemma_jax.training.trainer import Trainer

EACH = optax.softmax_cross_entropy_with_integer_labels
CONFIG = FinetuneConfig("", "")


def toy_loss(model, batch, max_targets):
    return jnp.sum(model["x"] * batch), 2.0


def toy_trainer(config=TOY, optimizer=None):
    return Trainer({"x": jnp.zeros(2)}, config, 4, toy_loss, optimizer)


def steps(trainer, count=3):
    """The parameters and reports of some steps with a gradient of 2 and 4."""
    state, reports = trainer.start(), []
    for _ in range(count):
        gradient = jnp.array([4.0, 8.0])
        state, report = trainer.step(state, trainer.frozen, gradient, max_targets=0)
        reports.append({name: float(value) for name, value in report.items()})
    return np.asarray(state.trainable["x"]), reports


# ---- Losses


@pytest.fixture(scope="module")
def model():
    return load_model(TINY)


@pytest.mark.parametrize("reduction", ["tokens", "examples"])
@pytest.mark.parametrize("loss", [EACH, cross_entropy])
@pytest.mark.thorough
def test_losses_of_logits_equal_the_default(model, loss, reduction):
    """For rows of 5 and 3 targets, weighted 1 and 3."""
    config = replace(CONFIG, reduction=reduction)
    data = Batch(jax.tree.map(jnp.asarray, batch(model)), jnp.array([1.0, 3.0]))
    expected = make_loss(config, None)(model, data, 8)
    np.testing.assert_allclose(make_loss(config, loss)(model, data, 8), expected, rtol=1e-5)


def test_options_of_a_loss_are_given_with_partial(model):
    data = Batch(jax.tree.map(jnp.asarray, batch(model)), jnp.ones(2))
    own = make_loss(CONFIG, partial(cross_entropy, smoothing=0.1))
    expected = make_loss(replace(CONFIG, label_smoothing=0.1), None)(model, data, 8)
    np.testing.assert_allclose(own(model, data, 8), expected, rtol=1e-5)


@pytest.mark.parametrize(
    "loss,message",
    [
        (3, "loss must be a function of .*, got 3"),
        (lambda: 0, r"loss must be a function of .*, got \(\)"),
        (lambda model, batch: 0, r"loss must be a function of .*, got \(model, batch\)"),
        (lambda logits, tokens: logits.sum(), r"of shape \(2, 8\), got \(\)"),
        (lambda logits, tokens, targets: logits[..., 0], r"a scalar, got \(1, 9\)"),
        (lambda model, batch, n: jnp.ones(3), r"must return \(sum, divisor\), two scalars"),
        (lambda model, batch, n: (jnp.ones(3), 1.0), r"got \[\(3,\), \(\)\]"),
    ],
)
def test_a_loss_of_the_wrong_form_is_one_sentence(model, loss, message):
    data = Batch(jax.tree.map(jnp.asarray, batch(model)), jnp.ones(2))
    with pytest.raises(ValueError, match=message) as error:
        make_loss(CONFIG, loss)(model, data, 8)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "option,loss",
    [("label_smoothing", EACH), ("label_smoothing", toy_loss), ("reduction", toy_loss)],
)
def test_options_that_do_not_apply_to_a_loss_are_refused(option, loss):
    value = {"label_smoothing": 0.1, "reduction": "examples"}[option]
    with pytest.raises(ValueError, match=f"--{option.replace('_', '-')} {value} does not apply"):
        make_loss(replace(CONFIG, **{option: value}), loss)


# ---- Optimizers

OWN = FinetuneConfig("", "", clip=0)  # every option of optimizers has its default


def test_a_transformation_replaces_the_optimizer():
    """It gets averaged gradients, and reports the rate that it injects, as of each step."""
    schedule = optax.linear_schedule(1.0, 0.0, 4)
    own = optax.inject_hyperparams(optax.sgd)(learning_rate=schedule)
    x, reports = steps(toy_trainer(OWN, own))
    np.testing.assert_allclose(x, -np.array([2.0, 4.0]) * (1 + 0.75 + 0.5), rtol=1e-6)
    assert [report["learning_rate"] for report in reports] == [1.0, 0.75, 0.5]
    assert reports[0]["gradient_norm"] == pytest.approx(20**0.5)
    assert "learning_rate" not in steps(toy_trainer(OWN, optax.sgd(1.0)))[1][0]


def test_a_function_gets_the_schedule():
    config = replace(OWN, learning_rate=0.1, schedule="linear", warmup=0)
    x, reports = steps(toy_trainer(config, optax.sgd))
    np.testing.assert_allclose(x, -np.array([2.0, 4.0]) * (0.1 + 0.075 + 0.05), rtol=1e-6)
    rates = [report["learning_rate"] for report in reports]
    np.testing.assert_allclose(rates, [0.1, 0.075, 0.05], rtol=1e-6)


def test_an_optimizer_may_read_the_loss():
    own = optax.chain(optax.sgd(1.0), optax.contrib.reduce_on_plateau(patience=1, factor=0.5))
    assert np.isfinite(steps(toy_trainer(OWN, own))[0]).all()


@pytest.mark.parametrize(
    "options,optimizer,message",
    [
        ({"weight_decay": 0.1}, optax.lion, "--weight-decay 0.1 does not apply to optimizer="),
        ({"learning_rate": 1.0}, optax.sgd(1.0), "--learning-rate 1.0 does not apply to"),
        ({}, "adam", "optimizer must be an optax.GradientTransformation, .* got 'adam'"),
        ({}, lambda schedule: 3, "optimizer must be an optax.GradientTransformation"),
    ],
)
def test_an_optimizer_that_does_not_fit_is_one_sentence(options, optimizer, message):
    with pytest.raises(ValueError, match=message):
        toy_trainer(replace(OWN, **options), optimizer)


# ---- Metrics


def exact(answers, references):
    return float(np.mean([a in r for a, r in zip(answers, references, strict=True)]))


def length(answers, references):
    return float(np.mean([len(answer) for answer in answers]))


length.better = "lower"


@pytest.mark.parametrize(
    "names,metrics,message",
    [
        (["exact_mach"], [], r"got exact_mach \(did you mean exact_match\?\)"),
        (["anls"], ["anls"], "metrics must have different names, got validation_anls twice"),
        ([], [3], "metrics must be names or functions, got 3"),
        ([], "anls", "metrics must be a list of names or functions, got 'anls'"),
    ],
)
def test_unusable_metrics_are_one_sentence(names, metrics, message):
    with pytest.raises(ValueError, match=message):
        make_measures(names, metrics)


def test_metrics_are_tried_on_the_references(data):
    rows = [{"image": str(data.parent / "0.png"), "prefix": "ocr", "suffix": "1"}]
    check_measures(make_measures(["exact_match"], [exact]), rows)
    for metric, message in (
        ("box_iou", "validation: box_iou: .* needs a box in every row"),
        (lambda answers, references: "many", "metric .* must return a number, got 'many'"),
    ):
        for image in (rows[0]["image"], np.zeros((8, 8, 3), np.uint8)):
            with pytest.raises(ValueError, match=message) as error:
                check_measures(make_measures([], [metric]), [rows[0] | {"image": image}])
            assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="--metric and metrics= require --validation"):
        check_measures(make_measures(["anls"], []), [])


@pytest.mark.parametrize("better,best", [("higher", 2), ("lower", 3)])
def test_the_best_checkpoint_is_by_metric(tmp_path, better, best):
    """It is kept although its loss is not the lowest, and found by another process."""
    criterion = Criterion("validation_f", better)
    checkpoints, trainer = Checkpoints(tmp_path, 1, criterion), toy_trainer()
    state = trainer.start()
    for step, value in enumerate([0.3, 0.9, 0.1, 0.5], 1):
        checkpoints.save(step, state, {"validation_loss": float(-step), "validation_f": value})
    checkpoints.finish()
    assert Checkpoints(tmp_path, 1, criterion).best_step() == best
    kept = sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    assert kept == [best, 4]


# ---- Runs


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """A run with everything of one's own, which a callback ends after step 3 of 5."""
    folder, events = tmp_path_factory.mktemp("own") / "run", []

    def watch(event):
        moved = float(jnp.abs(event.state.trainable["projector/bias"]).sum())
        events.append((event.step, event.is_validated, dict(event.report), moved))
        return event.step == 3

    result = pg.finetune(own_config(data, folder), callbacks=[watch], **FUNCTIONS)
    assert result == folder / "model"
    return folder, events


FUNCTIONS = dict(loss=EACH, optimizer=optax.lion, metrics=[length])


def own_config(data, folder, **options):
    default = dict(steps=5, train="projector", validate_every=2, samples=1)
    default |= dict(validation=str(data), metric=("exact_match",), learning_rate=1e-3)
    return small_config(data, folder, **default | options)


@pytest.mark.thorough
def test_callbacks_see_each_step_and_can_end_a_run(run):
    folder, events = run
    assert [event[:2] for event in events] == [(1, False), (2, True), (3, False)]
    log = read_log(folder)
    assert [event[2] for event in events] == log and len({event[3] for event in events}) == 3
    assert log[1].keys() - log[0].keys() == {
        "validation_loss",
        "validation_exact_match",
        "validation_length",
    }
    assert all("gradient_norm" in line and "learning_rate" in line for line in log)


def test_logged_metrics_are_those_of_the_model(run, data):
    """Greedy answers of the checkpoint of step 2 give the same metrics."""
    folder, _ = run
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    images = [data.parent / row["image"] for row in rows]
    answers = pg.load(folder / "checkpoints/2").generate(images, ["ocr"] * len(rows), 64)
    line = read_log(folder)[1]
    references = [[row["suffix"]] for row in rows]
    assert line["validation_exact_match"] == exact(answers, references)
    assert line["validation_length"] == pytest.approx(length(answers, references))


@pytest.mark.thorough
def test_an_interrupted_run_with_own_functions_resumes(run, data, tmp_path):
    """A callback that fails loses no step; the run then ends as one that did not fail."""
    folder, _ = run

    def fail(event):
        if event.step == 2:
            raise RuntimeError("of the user")
        return event.step == 3

    config = own_config(data, tmp_path / "run")
    with pytest.raises(RuntimeError, match="of the user"):
        pg.finetune(config, callbacks=[fail], **FUNCTIONS)
    assert len(losses(tmp_path / "run")) == 2
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    resumed = replace(config, resume=True)
    pg.finetune(resumed, callbacks=[lambda event: event.step == 3], **FUNCTIONS)
    assert losses(tmp_path / "run") == losses(folder)
    assert_equal(weights(tmp_path / "run/model"), weights(folder / "model"))
    other = replace(resumed, output=str(tmp_path / "other"))
    with pytest.raises(
        ValueError, match=r"was started with another optimizer: its state .* Resume"
    ):
        pg.finetune(other, **FUNCTIONS | {"optimizer": optax.adam})
    with pytest.raises(ValueError, match=r"was started with the metrics .*exact_match"):
        pg.finetune(other, **FUNCTIONS | {"metrics": []})
    assert (tmp_path / "other/checkpoints/2").is_dir()


def test_functions_that_cannot_be_used_write_nothing(data, tmp_path):
    config = own_config(data, tmp_path / "run")
    for functions, message in (
        ({"loss": lambda logits, tokens: logits.sum()}, "must return the loss of each token"),
        ({"callbacks": print}, "callbacks must be a list of functions"),
    ):
        with pytest.raises(ValueError, match=message):
            pg.finetune(config, **functions)
    with pytest.raises(ValueError, match="--metric must be names, got 'anls'"):
        replace(config, metric="anls")
    assert not (tmp_path / "run").exists()


# ---- Loggers


@pytest.mark.parametrize("name", ["wandb", "trackio"])
@pytest.mark.thorough
def test_trackers_get_the_numbers_of_each_step(data, tmp_path, monkeypatch, name):
    """A stand-in records what it is called with."""
    calls, module = [], ModuleType(name)
    module.init = lambda **options: calls.append(("init", options))
    module.log = lambda values, step: calls.append((step, values))
    module.finish = lambda: calls.append(("finish", {}))
    monkeypatch.setitem(sys.modules, name, module)
    config = small_config(data, tmp_path / "run", steps=2, train="projector", log=(name,))
    pg.finetune(config)
    pg.finetune(replace(config, steps=2, resume=True))
    assert [call for call, _ in calls] == ["init", 1, 2, "finish", "init", "finish"]
    assert calls[1][1].keys() >= {"loss", "gradient_norm", "learning_rate"}
    first, second = (options for call, options in calls if call == "init")
    assert first["config"]["batch_size"] == 4 and first["name"] == "run"
    assert first.get("id") == second.get("id") and ("id" in first) == (name == "wandb")


def test_a_logger_that_is_not_installed_is_named(data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    config = small_config(data, tmp_path / "run", steps=1, log=("trackio",))
    with pytest.raises(ValueError, match="--log trackio requires the package trackio: pip install"):
        pg.finetune(config)
    with pytest.raises(ValueError, match="--log must be one of tensorboard, wandb, trackio, got x"):
        small_config(data, tmp_path / "run", log=("x",))
    assert not (tmp_path / "run").exists()
