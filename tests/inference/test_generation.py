"""Decoding step by step is one full forward; a row's answer is its own, whatever the company; both layer forms, both profiles."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.decoding import prefill, tokens_of
from support.hf_models import random_inputs
from support.rows import one_row, replace_config

from paligemma_jax.inference import generate, scoring
from paligemma_jax.inference.request import make_request
from paligemma_jax.inference.sampling import Greedy, Sample
from paligemma_jax.model.stack import stack_layers

KINDS = pytest.mark.parametrize("kind", ["pg2", "pg1"])
PROFILES = pytest.mark.parametrize("numerics", ["transformers", "big_vision"])


def stacked(model):
    copy = jax.tree.map(lambda a: a, model)
    copy.vision.layers, copy.decoder.layers = stack_layers(model.vision.layers), stack_layers(model.decoder.layers)
    return copy


def close(found, expected):
    """Within 1e-5 of the largest logit: what the order of a sum alone can do."""
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


@KINDS
@PROFILES
@pytest.mark.parametrize("form,side", [(lambda model: model, "left"), (stacked, "right")], ids=["list", "stack"])
def test_step_by_step_equals_one_forward(random_checkpoint, kind, numerics, form, side):
    """Ragged rows, different image counts, the window of 8 crossed, on either side padded."""
    reference, _, model = random_checkpoint(kind, 5, numerics)
    model, steps = form(model), 14
    asked = random_inputs(reference, ((1, 7, 0), (2, 2, 0)), 1, side, "mixed")
    rng = np.random.default_rng(2)
    answer = rng.integers(5, 450, (2, steps)).astype(np.int32)
    logits, cache = prefill(model, asked, asked.tokens.shape[1] + steps + 3)
    step = jax.jit(lambda model, token, cache: model.decode_step(token, cache))
    found = [logits]
    for t in range(steps):
        logits, cache = step(model, jnp.asarray(answer[:, t]), cache)
        found.append(logits)
    for row, images in enumerate((slice(0, 1), slice(1, 3))):
        alone = one_row(asked, row, images)
        more = np.ones((1, steps), bool)
        whole = replace(
            alone,
            tokens=np.concatenate([alone.tokens, answer[row : row + 1]], 1),
            **{name: np.concatenate([getattr(alone, name), more & (name != "prefix")], 1) for name in ("valid", "prefix", "targets")},
        )
        if numerics == "big_vision":  # which caps the logits of later tokens only (Numerics.capped_prefill)
            expected = capped_after_first(model, whole, alone.tokens.shape[1])
        else:
            expected = np.asarray(scoring.forward(model, whole))[0, alone.tokens.shape[1] - 1 :]
        close(np.stack([np.asarray(logits[row]) for logits in found]), expected)


def capped_after_first(model, inputs, prompt):
    logits = np.asarray(scoring.forward(model, inputs))[0, prompt - 1 :]
    cap = model.config.decoder.final_logit_softcapping
    return logits if cap is None else np.concatenate([logits[:1], cap * np.tanh(logits[1:] / cap)])


@KINDS
@pytest.mark.parametrize("sampler", [Greedy(), Sample(temperature=0.8, top_k=20, repetition_penalty=1.1)], ids=["greedy", "sample"])
def test_a_row_is_its_own(random_checkpoint, kind, sampler):
    """Alone, in a batch, in another order, padded left or right, in a larger bucket, list or stacked: the same tokens and logits."""
    reference, _, model = random_checkpoint(kind, 5)
    rows = random_inputs(reference, ((1, 7, 0), (2, 2, 0), (1, 1, 0)), 1, order="mixed")
    images = (slice(0, 1), slice(1, 3), slice(3, 4))
    seeds = np.array([11, 22, 33])

    def tokens_of(model, rows, new, sampler, seeds, slots=60):
        """And the logits after the prompt: those of each row as it first appeared."""
        logits, _ = prefill(model, rows, slots)
        found = generate.generate(model, rows, new, sampler=sampler, seeds=seeds, slots=slots)
        for row, seed in zip(np.asarray(logits), seeds):
            close(row, first.setdefault(int(seed), row))
        return found.tokens

    first = {}
    expected = tokens_of(model, rows, 12, sampler=sampler, seeds=seeds)
    for row in range(3):
        alone = tokens_of(model, one_row(rows, row, images[row]), 12, sampler=sampler, seeds=seeds[row : row + 1])
        np.testing.assert_array_equal(alone[0], expected[row])
    order = [2, 0, 1]
    shuffled = jax.tree.map(lambda a: a[np.array(order)], replace(rows, images=rows.tokens))
    shuffled = replace(shuffled, images=rows.images[[3, 0, 1, 2]])
    np.testing.assert_array_equal(tokens_of(model, shuffled, 12, sampler=sampler, seeds=seeds[order]), expected[order])
    right = random_inputs(reference, ((1, 7, 0), (2, 2, 0), (1, 1, 0)), 1, "right", "mixed")
    wide = random_inputs(reference, ((1, 7, 0), (2, 2, 0), (1, 1, 0)), 1, order="mixed", length=77)
    for other in (right, wide):
        np.testing.assert_array_equal(tokens_of(model, other, 12, sampler=sampler, seeds=seeds, slots=100), expected)
    np.testing.assert_array_equal(tokens_of(stacked(model), rows, 12, sampler=sampler, seeds=seeds), expected)


def test_sampling_follows_the_distribution(random_checkpoint):
    """4,000 draws of the first token: each of the likely tokens comes as often as its probability says."""
    reference, _, model = random_checkpoint("pg2", 5)
    one = random_inputs(reference, ((1, 7, 0),), 1)
    logits, _ = prefill(model, one, 40)
    many = replace(one, **{name: np.repeat(getattr(one, name), 250, 0) for name in ("tokens", "valid", "prefix", "targets", "images")})
    sampler = Sample(temperature=2.0)
    drawn = np.concatenate([tokens_of(model, many, 1, sampler=sampler, seeds=np.arange(250) + 250 * i)[:, 0] for i in range(16)])
    probabilities = np.asarray(jax.nn.softmax(logits[0] / 2))
    for token in np.argsort(probabilities)[-5:]:
        p = probabilities[token]
        assert abs((drawn == token).mean() - p) < 4 * (p * (1 - p) / 4000) ** 0.5


def test_forbidden_ids_are_never_emitted(random_checkpoint):
    """Ids that `allowed` rules out do not come, however likely."""
    reference, _, model = random_checkpoint("pg2", 5)
    inputs = random_inputs(reference, ((1, 7, 0), (1, 2, 0)), 1)
    likely = np.unique(tokens_of(model, inputs, 12))
    allowed = np.ones(model.config.decoder.vocab_size, bool)
    allowed[likely] = False
    assert not np.isin(tokens_of(model, inputs, 12, allowed=allowed), likely[likely != 0]).any()


def test_the_loop_stops_at_the_last_eos(random_checkpoint):
    """When all rows have said eos no further step is run: the cache says how many were."""
    reference, _, model = random_checkpoint("pg2", 5)
    inputs = random_inputs(reference, ((1, 7, 0),), 1)
    free = tokens_of(model, inputs, 12)
    model = replace_config(model, eos_token_ids=(int(free[0, 4]),))
    request = make_request(model, 1)
    state = generate.prefill(model, inputs, generate.encode_inputs(model, inputs), request, inputs.tokens.shape[1] + 12, Greedy())
    out, _, state = generate.decode(model, state, request, jnp.int32(12), 12, Greedy())
    first = list(free[0]).index(free[0, 4])
    assert int(state.cache.length) == inputs.tokens.shape[1] + first
    np.testing.assert_array_equal(np.asarray(out)[0], [*free[0, 1 : first + 1], *[0] * (12 - first)])


@KINDS
def test_score(random_checkpoint, kind):
    """The sum of the log-probabilities of suffix and eos, row by row."""
    reference, _, model = random_checkpoint(kind, 5)
    inputs = random_inputs(reference, ((1, 7, 3), (2, 2, 6)), 1, order="mixed")
    logp = np.asarray(jax.nn.log_softmax(scoring.forward(model, inputs)))
    expected = [sum(logp[b, t - 1, inputs.tokens[b, t]] for t in np.flatnonzero(inputs.targets[b])) for b in range(2)]
    np.testing.assert_allclose(scoring.score(model, inputs), expected, rtol=1e-5)


def test_wrong_requests(random_checkpoint):
    reference, _, model = random_checkpoint("pg2", 5)
    inputs = random_inputs(reference, ((1, 7, 0),), 1)
    with pytest.raises(ValueError, match="max_new_tokens is 0"):
        tokens_of(model, inputs, 0)
    with pytest.raises(ValueError, match="do not fit a cache"):
        tokens_of(model, inputs, 10, slots=20)
    for wrong in (dict(temperature=0), dict(top_k=0), dict(top_p=1.5), dict(min_p=-1), dict(repetition_penalty=0)):
        with pytest.raises(ValueError, match="makes no sense"):
            Sample(**wrong)
