"""Step-by-step decoding equals one full forward pass, and an answer does not depend on its batch:
for both layer forms and both profiles."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.decoding import prefill, tokens_of
from support.hf_models import random_inputs
from support.rows import FIELDS, one_row, replace_config

from paligemma_jax.inference import generate, scoring
from paligemma_jax.inference.options import DecodingOptions
from paligemma_jax.inference.request import make_request
from paligemma_jax.inference.sampling import Greedy, Sample
from paligemma_jax.model.stack import stack_model

KINDS = pytest.mark.parametrize("kind", ["pg2", "pg1"])
PROFILES = pytest.mark.parametrize("numerics", ["transformers", "big_vision"])
ROWS = ((1, 7, 0), (2, 2, 0), (1, 1, 0))  # images, prompt tokens, suffix tokens


def stacked(model):
    return stack_model(model, delete=False)


def assert_close(actual, expected):
    """Compare within 1e-5 of the largest logit, which allows for the order of summation."""
    np.testing.assert_allclose(actual, expected, atol=1e-5 * np.abs(expected).max())


@KINDS
@PROFILES
@pytest.mark.parametrize(
    "form,side", [(lambda model: model, "left"), (stacked, "right")], ids=["list", "stack"]
)
def test_step_by_step_equals_one_forward(random_checkpoint, kind, numerics, form, side):
    """Tests ragged rows with different numbers of images, longer than the window of 8."""
    reference, _, model = random_checkpoint(kind, 5, numerics)
    model, steps = form(model), 14
    prompts = random_inputs(reference, ROWS[:2], 1, side, "mixed")
    rng = np.random.default_rng(2)
    answers = rng.integers(5, 450, (2, steps)).astype(np.int32)
    logits, cache = prefill(model, prompts, prompts.tokens.shape[1] + steps + 3)
    step = jax.jit(lambda model, token, cache: model.decode_step(token, cache))
    stepped = [logits]
    for t in range(steps):
        logits, cache = step(model, jnp.asarray(answers[:, t]), cache)
        stepped.append(logits)
    for row, images in enumerate((slice(0, 1), slice(1, 3))):
        prompt = one_row(prompts, row, images)
        new = np.ones((1, steps), bool)
        fields = dict(tokens=answers[row : row + 1], valid=new, prefix=~new, targets=new)
        full = replace(
            prompt,
            **{
                name: np.concatenate([getattr(prompt, name), values], axis=1)
                for name, values in fields.items()
            },
        )
        expected = np.asarray(scoring.forward(model, full))[0, prompt.tokens.shape[1] - 1 :]
        if numerics == "big_vision":
            expected = cap_after_first(model, expected)
        assert_close(np.stack([np.asarray(logits[row]) for logits in stepped]), expected)


def cap_after_first(model, logits):
    """big_vision caps the logits of later tokens only (Numerics.capped_prefill)."""
    cap = model.config.decoder.final_logit_softcapping
    if cap is None:
        return logits
    return np.concatenate([logits[:1], cap * np.tanh(logits[1:] / cap)])


@pytest.mark.parametrize("kind", ["pg2", pytest.param("pg1", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "sampler",
    [Greedy(), Sample(temperature=0.8, top_k=20, repetition_penalty=1.1)],
    ids=["greedy", "sample"],
)
def test_an_answer_does_not_depend_on_its_batch(random_checkpoint, kind, sampler):
    """Tokens and logits are the same alone, in a batch, in another order, padded left or right, in
    a larger bucket, with layers as a list or stacked."""
    reference, _, model = random_checkpoint(kind, 5)
    rows = random_inputs(reference, ROWS, 1, order="mixed")
    images = (slice(0, 1), slice(1, 3), slice(3, 4))
    seeds = np.array([11, 22, 33])
    first_logits = {}

    def generate_and_compare_logits(model, rows, seeds, slots=60):
        logits, _ = prefill(model, rows, slots)
        for row, seed in zip(np.asarray(logits), seeds.tolist(), strict=True):
            assert_close(row, first_logits.setdefault(seed, row))
        return tokens_of(model, rows, 12, sampler=sampler, seeds=seeds, slots=slots)

    expected = generate_and_compare_logits(model, rows, seeds)
    for row in range(3):
        alone = one_row(rows, row, images[row])
        tokens = generate_and_compare_logits(model, alone, seeds[row : row + 1])
        np.testing.assert_array_equal(tokens[0], expected[row])
    order = np.array([2, 0, 1])
    shuffled = {name: getattr(rows, name)[order] for name in FIELDS}
    shuffled = replace(rows, images=rows.images[[3, 0, 1, 2]], **shuffled)
    tokens = generate_and_compare_logits(model, shuffled, seeds[order])
    np.testing.assert_array_equal(tokens, expected[order])
    right = random_inputs(reference, ROWS, 1, "right", "mixed")
    wide = random_inputs(reference, ROWS, 1, order="mixed", length=77)
    for padded in (right, wide):
        tokens = generate_and_compare_logits(model, padded, seeds, slots=100)
        np.testing.assert_array_equal(tokens, expected)
    tokens = generate_and_compare_logits(stacked(model), rows, seeds)
    np.testing.assert_array_equal(tokens, expected)


def test_sampling_follows_the_distribution(random_checkpoint):
    """4,000 draws of the first token: each likely token occurs as often as its probability
    predicts."""
    reference, _, model = random_checkpoint("pg2", 5)
    prompt = random_inputs(reference, ((1, 7, 0),), 1)
    logits, _ = prefill(model, prompt, 40)
    copies = {name: np.repeat(getattr(prompt, name), 250, 0) for name in (*FIELDS, "images")}
    prompts, sampler = replace(prompt, **copies), Sample(temperature=2.0)
    draws = [
        tokens_of(model, prompts, 1, sampler=sampler, seeds=np.arange(250) + 250 * i)[:, 0]
        for i in range(16)
    ]
    drawn, probabilities = np.concatenate(draws), np.asarray(jax.nn.softmax(logits[0] / 2))
    for token in np.argsort(probabilities)[-5:]:
        p = probabilities[token]
        assert abs((drawn == token).mean() - p) < 4 * (p * (1 - p) / 4000) ** 0.5


def test_forbidden_ids_are_never_generated(random_checkpoint):
    reference, _, model = random_checkpoint("pg2", 5)
    inputs = random_inputs(reference, ((1, 7, 0), (1, 2, 0)), 1)
    likely = np.unique(tokens_of(model, inputs, 12))
    allowed = np.ones(model.config.decoder.vocab_size, bool)
    allowed[likely] = False
    forbidden = likely[likely != 0]
    assert not np.isin(tokens_of(model, inputs, 12, allowed=allowed), forbidden).any()


def test_the_loop_stops_at_the_last_eos(random_checkpoint):
    """The length of the cache shows that no step runs after all rows have produced eos."""
    reference, _, model = random_checkpoint("pg2", 5)
    inputs = random_inputs(reference, ((1, 7, 0),), 1)
    free, tokens = tokens_of(model, inputs, 12), inputs.tokens.shape[1]
    model = replace_config(model, eos_token_ids=(int(free[0, 4]),))
    request, features = make_request(model, 1), generate.encode_inputs(model, inputs)
    state = generate.prefill(model, inputs, features, request, tokens + 12, Greedy())
    out, state = generate.decode(model, state, request, jnp.int32(12), 12, Greedy())
    first = list(free[0]).index(free[0, 4])
    assert int(state.cache.length) == tokens + first
    expected = [*free[0, 1 : first + 1], *[0] * (12 - first)]
    np.testing.assert_array_equal(np.asarray(out.tokens)[0], expected)


@KINDS
def test_a_score_is_the_sum_of_the_log_probabilities_of_suffix_and_eos(random_checkpoint, kind):
    reference, _, model = random_checkpoint(kind, 5)
    inputs = random_inputs(reference, ((1, 7, 3), (2, 2, 6)), 1, order="mixed")
    log_p = np.asarray(jax.nn.log_softmax(scoring.forward(model, inputs)))
    expected = [
        sum(log_p[b, t - 1, inputs.tokens[b, t]] for t in np.flatnonzero(inputs.targets[b]))
        for b in range(2)
    ]
    np.testing.assert_allclose(scoring.score(model, inputs), expected, rtol=1e-5)


def test_invalid_options(random_checkpoint):
    reference, _, model = random_checkpoint("pg2", 5)
    inputs = random_inputs(reference, ((1, 7, 0),), 1)
    with pytest.raises(ValueError, match="max_new_tokens must be an integer of at least 1, got 0"):
        DecodingOptions(0)
    with pytest.raises(ValueError, match=r"slots must be at least .* got 20"):
        tokens_of(model, inputs, 10, slots=20)
    for name, value in dict(
        temperature=0, top_k=0, top_p=1.5, min_p=-1, repetition_penalty=0
    ).items():
        with pytest.raises(ValueError, match=rf"Sample\.{name} must be .*, got {value}"):
            Sample(**{name: value})
