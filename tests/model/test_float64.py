"""The model in float64 against a numpy forward pass in float64, and what float64 refuses."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.golden import from_bytes
from support.numpy_forward import forward, softmax
from support.paths import GOLDEN

import paligemma_jax as pg
from paligemma_jax.checkpoints.load import load_model
from paligemma_jax.checkpoints.source import resolve
from paligemma_jax.inference import generate, scoring
from paligemma_jax.inference.options import DecodingOptions
from paligemma_jax.model.paligemma import PaliGemma
from paligemma_jax.model.stack import stack_model
from paligemma_jax.model.tree import parameters
from paligemma_jax.training.config import FinetuneConfig
from paligemma_jax.training.losses import answer_loss
from paligemma_jax.training.prepare import load_trainable

NEW = 12  # tokens, longer than the window of 8
EXACT = 1e-12  # of logits with a standard deviation of 4; measured: up to 1.3e-13


@cache
def inputs_of(kind: str) -> pg.Inputs:
    """Rows of one and two images, with a suffix."""
    with np.load(GOLDEN / kind / "expected.npz") as file:
        expected = dict(file)
    tokens, *flags = (expected[name] for name in ("tokens", "valid", "prefix", "targets"))
    return pg.Inputs(tokens, from_bytes(expected["bytes"]), *flags)


def load(kind: str, layers: str) -> tuple[PaliGemma, dict]:
    """The model, and its weights by path."""
    model = load_model(GOLDEN / kind, "float64")
    weights = parameters(model)
    return (stack_model(model, delete=False) if layers == "stack" else model), weights


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("kind,layers", [("pg1", "list"), ("pg2", "list"), ("pg2", "stack")])
def test_teacher_forced_logits_and_scores(x64, kind, layers):
    model, weights = load(kind, layers)
    inputs = inputs_of(kind)
    expected = forward(weights, model.config, inputs)
    actual = np.asarray(scoring.forward(model, inputs))
    assert actual.dtype == np.float64
    assert np.abs(actual - expected)[inputs.valid].max() < EXACT
    log_probabilities = np.log(softmax(expected[:, :-1]))
    chosen = np.take_along_axis(log_probabilities, inputs.tokens[:, 1:, None], 2)[..., 0]
    scores = np.where(inputs.targets[:, 1:], chosen, 0).sum(axis=1)
    np.testing.assert_allclose(scoring.score(model, inputs), scores, rtol=1e-12)


@pytest.mark.parametrize("kind,layers", [("pg1", "stack"), ("pg2", "list")])
def test_greedy_decoding_with_the_cache(x64, kind, layers):
    model, weights = load(kind, layers)
    inputs = prompts_of(kind)
    made = generate.generate(model, inputs, DecodingOptions(NEW, min_new_tokens=NEW, logits=True))
    expected = forward(weights, model.config, with_answers(inputs, made.tokens))
    expected = expected[:, inputs.tokens.shape[1] - 1 : -1]
    assert made.logits is not None and np.abs(made.logits - expected).max() < EXACT
    expected[:, : NEW - 1, list(model.config.eos_token_ids)] = -np.inf
    np.testing.assert_array_equal(made.tokens, expected.argmax(-1))


def prompts_of(kind: str) -> pg.Inputs:
    """The prompts without their suffixes, with pads on the left."""
    inputs = inputs_of(kind)
    length = int(inputs.prefix.sum(axis=1).max())
    shape = len(inputs.tokens), length
    tokens, valid = np.zeros(shape, np.int32), np.zeros(shape, bool)
    for row, prefix in enumerate(inputs.prefix):
        start = length - prefix.sum()
        tokens[row, start:], valid[row, start:] = inputs.tokens[row, prefix], True
    return pg.Inputs(tokens, inputs.images, valid, valid, valid & False)


def with_answers(inputs: pg.Inputs, answers: np.ndarray) -> pg.Inputs:
    yes = np.ones(answers.shape, bool)

    def join(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.concatenate([a, b], axis=1)

    return replace(
        inputs,
        tokens=join(inputs.tokens, answers),
        valid=join(inputs.valid, yes),
        prefix=join(inputs.prefix, ~yes),
        targets=join(inputs.targets, yes),
    )


def test_float64_is_never_float32():
    """Without 64-bit mode, neither loading nor a model made within that mode computes at all."""
    with pytest.raises(ValueError, match="JAX_ENABLE_X64=1"):
        pg.load("tiny", dtype="float64")
    with jax.enable_x64(True):
        model = load_model(GOLDEN / "pg2", "float64")
    with pytest.raises(ValueError, match="JAX_ENABLE_X64=1"):
        scoring.forward(model, inputs_of("pg2"))


def test_what_float64_refuses(x64):
    with pytest.raises(ValueError, match="not quantized"):
        load_model("tiny", "float64", quantize="int8")
    with pytest.raises(ValueError, match="--dtype must be"):
        load_trainable(FinetuneConfig("rows", "run", dtype="float64"), resolve("tiny"), None)


def test_gradients(x64):
    """The derivative of the loss in a random direction, against differences of the numpy forward
    pass."""
    model, weights = load("pg2", "list")
    inputs = inputs_of("pg2")
    rng = np.random.default_rng(0)
    step = {path: rng.normal(size=value.shape) for path, value in weights.items()}
    count = int(inputs.targets.sum(axis=1).max())

    def loss(model: PaliGemma) -> jax.Array:
        return answer_loss(model, jax.tree.map(jnp.asarray, inputs), jnp.ones(2), count)[0]

    gradient = parameters(jax.jit(jax.grad(loss))(model))
    actual = sum(np.sum(np.asarray(gradient[path]) * step[path]) for path in weights)

    def moved(h: float) -> float:
        changed = {path: np.asarray(value) + h * step[path] for path, value in weights.items()}
        logits = forward(changed, model.config, inputs)
        chosen = np.take_along_axis(softmax(logits[:, :-1]), inputs.tokens[:, 1:, None], 2)[..., 0]
        return -np.sum(np.log(chosen), where=inputs.targets[:, 1:])

    h = 1e-6  # the error of this formula is of order h ** 4
    expected = (8 * (moved(h) - moved(-h)) - (moved(2 * h) - moved(-2 * h))) / (12 * h)
    np.testing.assert_allclose(actual, expected, rtol=1e-9)  # measured: 1e-11
