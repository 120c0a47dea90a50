"""Answers of an engine, and of each request alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from paligemma_jax.inference.answer import Answer
from paligemma_jax.inference.engine import Engine


def run(engine: Engine, arrivals: Iterable[Sequence[tuple]]) -> list[Answer]:
    """Submit requests (prompt, options, seed, adapter if any) in groups, with a step after each
    group. Returns the answers in order."""
    answers, numbers = {}, []
    for group in arrivals:
        for prompt, options, seed, *adapter in group:
            named = {"adapter": adapter[0]} if adapter else {}
            numbers.append(engine.submit(prompt, options, seed, **named))
        answers |= engine.step()
    for new in engine.answers():
        answers |= new
    return [answers[number] for number in numbers]


def alone(predictor, prompt, options, seed) -> Answer:
    (batch,) = predictor.batches([prompt], options, seeds=[seed])
    return batch[0]


def assert_same(ours: Answer, other: Answer, atol: float = 1.8e-5) -> None:
    """Two answers are equal, the log-probabilities to 1e-6 of the largest logit, 18. Two batch
    sizes of the predictor differ by 1.2e-5."""
    assert (ours.text, ours.tokens, ours.error) == (other.text, other.tokens, other.error)
    np.testing.assert_allclose(ours.log_probabilities, other.log_probabilities, atol=atol)
