"""What makes two runs equal bit for bit, and what equal up to rounding: docs/determinism.md."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.determinism import in_process
from support.on_devices import call

import paligemma_jax as pg
from paligemma_jax.inference import scoring
from paligemma_jax.inference.engine import Engine
from paligemma_jax.inference.options import DecodingOptions
from paligemma_jax.parity.case import DIGITS
from paligemma_jax.training.losses import answer_loss

PROMPTS = ["caption en", "detect 4", "ocr", "count 3"]
SUFFIXES = ["four digits: 4, 3, 2 and 3", "<loc0722><loc0219><loc1023><loc0448> 4", "4 3", "2"]
ROUNDING = 1e-6  # relative; measured: up to 4e-7


@pytest.fixture(scope="module")
def predictor():
    return pg.load("tiny")


@pytest.fixture(scope="module")
def batch(predictor):
    """Logits and inputs of four prompts."""
    return predictor.logits([DIGITS] * 4, PROMPTS, SUFFIXES)


def distance(a, b) -> float:
    a, b = np.asarray(a), np.asarray(b)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.mark.thorough
def test_a_program_gives_the_same_bits_each_time(predictor, batch):
    logits, inputs = batch
    for _ in range(3):
        np.testing.assert_array_equal(scoring.forward(predictor.model, inputs), logits)
    arrays = jax.tree.map(jnp.asarray, inputs)

    @jax.jit
    def gradient(model):
        return jax.grad(lambda model: answer_loss(model, arrays, jnp.ones(4), 48)[0])(model)

    first = gradient(predictor.model)
    for _ in range(5):
        jax.tree.map(np.testing.assert_array_equal, gradient(predictor.model), first)


def test_rows_of_a_batch_do_not_touch_each_other(predictor, batch):
    """With the same shapes, a row has the same bits in any company and in any place."""
    logits, _ = batch
    other, _ = predictor.logits([DIGITS] * 4, PROMPTS[::-1], SUFFIXES[::-1])
    np.testing.assert_array_equal(other[::-1], logits)


def test_other_shapes_differ_by_rounding(predictor, batch):
    """A row alone, and with 32 more pads."""
    logits, inputs = batch
    for row in range(4):
        alone, own = predictor.logits([DIGITS], PROMPTS[row : row + 1], SUFFIXES[row : row + 1])
        assert distance(alone[own.valid], logits[row][inputs.valid[row]]) < ROUNDING

    def pad(array):
        return np.pad(array, [(0, 0), (32, 0)])

    fields = ("tokens", "valid", "prefix", "targets")
    padded = replace(inputs, **{name: pad(getattr(inputs, name)) for name in fields})
    longer = np.asarray(scoring.forward(predictor.model, padded))[:, 32:]
    assert distance(longer[inputs.valid], logits[inputs.valid]) < ROUNDING


def test_a_list_a_stack_and_the_engine_choose_the_same_tokens(predictor, batch):
    logits, inputs = batch
    stacked = pg.load("tiny", layers="stack")
    again, _ = stacked.logits([DIGITS] * 4, PROMPTS, SUFFIXES)
    assert distance(again[inputs.valid], logits[inputs.valid]) < ROUNDING
    options = dict(max_new_tokens=8)
    answers = predictor.answers([DIGITS] * 4, PROMPTS, **options)
    engine = Engine(predictor.model, predictor.processor, rows=4)
    numbers = [
        engine.submit(prompt, DecodingOptions(**options))
        for prompt in predictor.processor.encode([DIGITS] * 4, PROMPTS)
    ]
    finished = {k: answer for new in engine.answers() for k, answer in new.items()}
    others = stacked.answers([DIGITS] * 4, PROMPTS, **options)
    for other in (others, [finished[k] for k in numbers]):
        for a, b in zip(answers, other, strict=True):
            assert a.tokens == b.tokens
            np.testing.assert_allclose(a.log_probabilities, b.log_probabilities, atol=2e-5)


@pytest.mark.slow
def test_another_process_and_another_number_of_threads(tmp_path):
    """A process that compiles anew gives the same bits. Threads change sums over tokens, which are
    split among them: those of gradients."""
    first, second, single = (
        in_process(tmp_path / f"{i}.npz", NPROC=threads) for i, threads in enumerate("441")
    )
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name], name)
        if name != "gradient":
            np.testing.assert_array_equal(value, single[name], name)
    assert distance(single["gradient"], first["gradient"]) < 1e-7  # measured: 1e-8


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data=8", "fsdp=8", "tensor=2", "data=2,fsdp=2,tensor=2"])
def test_meshes_differ_by_rounding(mesh):
    result = call(8, "test_determinism.on_mesh", mesh)
    assert result["equal_twice"] and result["same_tokens"] and result["distance"] < ROUNDING


def on_mesh(mesh: str) -> dict:
    """Compare a mesh with one device, and with itself."""
    batch = [DIGITS] * 8, PROMPTS * 2
    single, sharded = pg.load("tiny"), pg.load("tiny", mesh=mesh)
    expected, inputs = single.logits(*batch, SUFFIXES * 2)
    first, second = (sharded.logits(*batch, SUFFIXES * 2)[0] for _ in range(2))
    answers = [p.generate(*batch, max_new_tokens=8) for p in (single, sharded)]
    return {
        "equal_twice": bool((first == second).all()),
        "same_tokens": answers[0] == answers[1],
        "distance": distance(first[inputs.valid], expected[inputs.valid]),
    }
