"""Every strategy, samplers of the user included, on eight devices and with weights in 8 bits."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support import on_devices, samplers
from support.dense import dense_model

import paligemma_jax as pg


def check(found, expected):
    """The same tokens, and the same scores up to rounding."""
    assert found.keys() == expected.keys()
    for name, answers in expected.items():
        for (tokens, score), (other, other_score) in zip(answers, found[name], strict=True):
            assert list(other) == list(tokens), name
            assert other_score == pytest.approx(score, abs=1e-4), name


@pytest.fixture(scope="module")
def on_one():
    return samplers.answers()


@pytest.mark.thorough
def test_strategies_differ(on_one):
    """Otherwise, equal answers would say little."""
    tokens = [[list(answer) for answer, _ in answers] for answers in on_one.values()]
    assert all(a != b for i, a in enumerate(tokens) for b in tokens[:i])


@pytest.mark.thorough
def test_eight_devices_answer_as_one(on_one):
    check(on_devices.call(8, "support.samplers.answers", "data=2,fsdp=2,tensor=2"), on_one)


@pytest.mark.thorough
def test_int8_answers_as_the_model_of_the_same_weights(on_one):
    quantized = pg.load("tiny", dtype="float32", quantize="int8")
    found = samplers.answers_of(quantized)
    model = dense_model(quantized.model, pg.load("tiny", dtype="float32").model)
    check(found, samplers.answers_of(replace(quantized, model=model)))
    assert found != on_one
