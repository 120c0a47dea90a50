"""Samplers of the user: those of docs/generation.md, against transformers and wherever `Greedy` and
`Sample` work."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
import pytest
from support import samplers
from support.decoding import tokens_of
from support.hf_models import hf_inputs, random_inputs
from support.rows import one_row

import paligemma_jax as pg
from paligemma_jax.inference import generate
from paligemma_jax.inference.options import DecodingOptions
from paligemma_jax.model.stack import stack_model

ROWS = ((1, 7, 0), (2, 3, 0), (1, 12, 0))


@pytest.fixture(scope="module")
def documented():
    return samplers.documented()


@pytest.fixture(scope="module")
def random_model(random_checkpoint):
    reference, _, model = random_checkpoint("pg2", 5)
    return reference, model, random_inputs(reference, ROWS, 3, order="mixed")


@pytest.mark.parametrize("n", [1, 3])
def test_the_documented_ban_is_that_of_transformers(documented, random_model, n):
    reference, model, inputs = random_model
    few = np.arange(model.config.decoder.vocab_size) % 40 == 7  # so that n-grams repeat
    few[inputs.tokens[0, -2:]] = True
    sampler = documented["NoRepeatNgrams"](n)
    length = 12 if n > 1 else 6
    tokens = tokens_of(model, inputs, length, sampler=sampler, allowed=few)
    expected = reference.generate(
        **hf_inputs(inputs),
        max_new_tokens=length,
        do_sample=False,
        no_repeat_ngram_size=n,
        suppress_tokens=np.flatnonzero(~few).tolist(),
    )
    np.testing.assert_array_equal(tokens, expected[:, inputs.tokens.shape[1] :].numpy())
    assert (tokens != tokens_of(model, inputs, length, allowed=few)).any()


@dataclass(frozen=True)
class Same(pg.Sample):
    """A sampler of the user that draws what `Sample` does, and keeps its own count of tokens."""

    def init(self, history, vocabulary):
        return super().init(history, vocabulary), history.valid.sum(axis=1)

    def __call__(self, logits, context, state):
        seen, count = state
        is_consistent = count == context.history.valid.sum(axis=1)
        tokens, seen = super().__call__(logits, context, seen)
        return jnp.where(is_consistent, tokens, -1), (seen, count + 1)


def test_a_sampler_of_the_user_draws_what_one_of_the_project_does(random_model):
    """As the best of several, and in chunks with stacked layers."""
    _, model, inputs = random_model
    filters = dict(temperature=1.5, top_p=0.9, repetition_penalty=1.3)
    expected = tokens_of(model, inputs, 7, sampler=pg.BestOf(3, pg.Sample(**filters)))
    tokens = tokens_of(model, inputs, 7, sampler=pg.BestOf(3, Same(**filters)))
    np.testing.assert_array_equal(tokens, expected)
    expected = tokens_of(model, inputs, 7, sampler=pg.Sample(**filters))
    stacked, options = stack_model(model, delete=False), DecodingOptions(7, Same(**filters))
    chunks = generate.decode_chunks(stacked, inputs, options, chunk=3)
    tokens = np.concatenate([chunk.tokens for chunk in chunks], axis=1)
    np.testing.assert_array_equal(tokens, expected)


def test_batch_company_and_padding_do_not_change_an_answer(documented, random_model):
    reference, model, inputs = random_model
    sampler = documented["NoRepeatNgrams"](2, documented["FadingPenalty"]())
    together = tokens_of(model, inputs, 9, sampler=sampler, seeds=np.array([5, 6, 7]))
    padded = random_inputs(reference, ROWS, 3, side="right", order="mixed", length=64)
    tokens = tokens_of(model, padded, 9, sampler=sampler, seeds=np.array([5, 6, 7]))
    np.testing.assert_array_equal(tokens, together)
    alone = one_row(inputs, 1, slice(1, 3))
    tokens = tokens_of(model, alone, 9, sampler=sampler, seeds=np.array([6]))
    np.testing.assert_array_equal(tokens[0], together[1])
    assert (tokens_of(model, alone, 9, sampler=sampler, seeds=np.array([8])) != tokens).any()


def test_the_state_of_a_sampler_reaches_the_next_token(documented, random_model):
    """Between two ids, a strong penalty alternates."""
    _, model, inputs = random_model
    two = np.isin(np.arange(model.config.decoder.vocab_size), [20, 30])
    sampler = documented["FadingPenalty"](strength=1e4, half_life=1.0)
    tokens = tokens_of(model, inputs, 9, sampler=sampler, allowed=two)
    assert (tokens[:, 1:] != tokens[:, :-1]).all()


@dataclass(frozen=True)
class Mixes:
    """A sampler that computes each token from the first and the last of the row."""

    def init(self, history, vocabulary):
        return None

    def __call__(self, logits, context, state):
        history = context.history
        first = jnp.take_along_axis(history.tokens, history.start[:, None], axis=1)[:, 0]
        last = jnp.take(history.tokens, history.length - 1, axis=1)
        return mix(first, last, context.step), state


def mix(first, last, step):
    return 10 + (first + 3 * last + step) % 300


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_history_ends_with_the_last_token(random_model, side):
    """For rows of different lengths, pads on either side."""
    reference, model, _ = random_model
    inputs = random_inputs(reference, ROWS, 3, side=side, order="mixed", length=64)
    rows = []
    for row, valid in zip(inputs.tokens, inputs.valid, strict=True):
        first, *_, last = map(int, row[valid])
        tokens = []
        for step in range(6):
            last = mix(first, last, step)
            tokens.append(last)
        rows.append(tokens)
    np.testing.assert_array_equal(tokens_of(model, inputs, 6, sampler=Mixes()), rows)


class Returns:
    """A sampler that returns a constant."""

    def __init__(self, result):
        self.result = result

    def init(self, history, vocabulary):
        return jnp.zeros(len(history.tokens))

    def __call__(self, logits, context, state):
        return self.result


WRONG_RESULTS = [
    (jnp.zeros(3, int), r"Returns must return \(tokens, state\), got int32\[3\]"),
    ((jnp.zeros(3), jnp.zeros(3)), r"Returns must return tokens int32\[3\], got float32\[3\]"),
    ((jnp.zeros(4, int), jnp.zeros(3)), r"must return tokens int32\[3\], got int32\[4\]"),
    ((jnp.zeros(3, int), None), r"the state of Returns must keep .*, float32\[3\], got None"),
    ((jnp.zeros(3, int), jnp.zeros(3, int)), r"must keep .*, float32\[3\], got int32\[3\]"),
]


@pytest.mark.parametrize(("result", "message"), WRONG_RESULTS)
def test_what_a_sampler_returns_is_checked(random_model, result, message):
    _, model, inputs = random_model
    with pytest.raises(ValueError, match=message):
        tokens_of(model, inputs, 2, sampler=Returns(result))


@dataclass(frozen=True)
class WithArray(pg.Sample):
    bias: object = None


def test_what_is_not_a_sampler_is_refused():
    for value in (pg.Greedy, "greedy", lambda logits: logits.argmax(-1), object()):
        with pytest.raises(
            ValueError, match=r"sampler must be Greedy\(\), .* with init and __call__"
        ):
            DecodingOptions(sampler=value)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="sampler must be hashable, a frozen dataclass of numbers"):
        DecodingOptions(sampler=WithArray(bias=np.zeros(3)))


def test_settings_identify_a_sampler_in_another_process():
    """A resumed run compares them: they have no addresses."""
    first, second = (DecodingOptions(sampler=Returns(0)).settings() for _ in range(2))
    assert first == second and "Returns" in first["sampler"]
    assert DecodingOptions(sampler=WithArray(0.5)).settings()["sampler"].endswith("bias=None)")
