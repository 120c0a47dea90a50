"""Beam search, best-of-n, and what a request may ask for, against transformers or plain arithmetic."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from support.hf_models import hf_inputs, random_inputs
from support.rows import replace_config
from transformers import GenerationConfig

from paligemma_jax.inference import generate, scoring
from paligemma_jax.inference.sampling import Beam, BestOf, Greedy, Sample

ROWS = [(1 + i % 2, 1 + i, 0) for i in range(10)]


@pytest.mark.parametrize(
    "beam", [Beam(2), Beam(4, 0.5), Beam(3, 2.0, True), Beam(4, -1.0), Beam(3, 1.0, "never"), Beam(1)], ids=lambda beam: str(beam)[5:-1]
)
def test_beam_gives_the_sequences_and_scores_of_transformers(random_checkpoint, beam):
    """Ten prompts a setting, several eos ids so that answers end at different lengths."""
    reference, _, model = random_checkpoint("pg2", 5)
    inputs = random_inputs(reference, ROWS, 3, order="mixed")
    model = replace_config(model, eos_token_ids=EOS)
    found = generate.generate(model, inputs, 12, sampler=beam)
    options = dict(num_beams=beam.width, length_penalty=beam.length_penalty, early_stopping=beam.early_stopping, eos_token_id=list(EOS))
    out = reference.generate(
        **hf_inputs(inputs), max_new_tokens=12, do_sample=False, return_dict_in_generate=True, output_scores=True, pad_token_id=0, **options
    )
    ends = set()
    for row, wanted in zip(found.tokens, out.sequences[:, inputs.tokens.shape[1] :].numpy()):
        end = next((i + 1 for i, token in enumerate(wanted) if token in EOS), len(wanted))
        ends.add(end)
        np.testing.assert_array_equal(row[:end], wanted[:end])
        assert not row[end:].any()  # transformers fills up with `pad_token_id or eos_token_id`, which is eos where pad is 0
    assert len(ends) > 1
    if beam.width > 1:
        np.testing.assert_allclose(found.scores, out.sequences_scores.numpy(), rtol=2e-5, atol=1e-5)


EOS = tuple(range(7, 450, 9))  # so many that answers of random models end, and at different lengths


def test_log_probabilities_are_those_of_a_teacher_forced_pass(random_checkpoint):
    """Of every token, whatever filter chose it; beams and samples alike."""
    reference, _, model = random_checkpoint("pg2", 5)
    inputs = random_inputs(reference, ROWS[:3], 3)
    for sampler in (Sample(temperature=0.7, top_k=9), Beam(3), BestOf(3)):
        found = generate.generate(model, inputs, 8, sampler=sampler)
        whole = answered(inputs, found.tokens)
        logp = np.asarray(jax.nn.log_softmax(scoring.forward(model, whole)))[:, inputs.tokens.shape[1] - 1 : -1]
        expected = np.take_along_axis(logp, found.tokens[..., None], axis=2)[..., 0] * (found.tokens != 0)
        np.testing.assert_allclose(found.log_probabilities, expected, atol=2e-4)
        if not isinstance(sampler, Beam):
            np.testing.assert_allclose(found.scores, found.log_probabilities.sum(1), rtol=1e-6)


def answered(inputs, tokens):
    join = lambda name, more: np.concatenate([getattr(inputs, name), more], axis=1)
    yes = np.ones_like(tokens, bool)
    fields = dict(tokens=join("tokens", tokens), valid=join("valid", yes), prefix=join("prefix", ~yes), targets=join("targets", yes))
    return type(inputs)(images=inputs.images, **fields)


def test_best_of_is_the_best_of_its_samples(random_checkpoint):
    """And no row's choice depends on the others."""
    reference, _, model = random_checkpoint("pg2", 5)
    inputs = random_inputs(reference, ROWS[:2], 3)
    sampler = Sample(temperature=1.5)
    best = generate.generate(model, inputs, 6, sampler=BestOf(8, sampler), seeds=np.array([6, 7]))
    one = generate.generate(model, inputs, 6, sampler=BestOf(1, sampler), seeds=np.array([6, 7]))
    assert (best.scores >= one.scores).all() and (best.scores > one.scores).any()
    again = generate.generate(model, random_inputs(reference, ROWS[:2], 3), 6, sampler=BestOf(8, sampler), seeds=np.array([6, 9]))
    np.testing.assert_array_equal(again.tokens[0], best.tokens[0])


@pytest.mark.parametrize("sampler", [Greedy(), Beam(3)], ids=["greedy", "beam"])
def test_min_new_tokens(random_checkpoint, sampler):
    """As transformers: no eos before."""
    reference, _, model = random_checkpoint("pg2", 5)
    inputs = random_inputs(reference, ROWS, 3, order="mixed")
    found = generate.generate(replace_config(model, eos_token_ids=EOS), inputs, 12, sampler=sampler, min_new_tokens=6).tokens
    options = dict(
        max_new_tokens=12, min_new_tokens=6, do_sample=False, num_beams=getattr(sampler, "width", 1), eos_token_id=list(EOS), pad_token_id=0
    )
    expected = reference.generate(**hf_inputs(inputs), **options)
    expected = expected[:, inputs.tokens.shape[1] :].numpy()
    ends = np.isin(expected, EOS)
    np.testing.assert_array_equal(found[:, : expected.shape[1]], np.where(np.cumsum(ends, axis=1) > ends, 0, expected))  # pads as above
    assert not np.isin(found[:, :6], EOS).any()


@pytest.mark.parametrize("sampler", [Sample(), Beam(2), BestOf(2)], ids=["sample", "beam", "best of"])
def test_allowed(random_checkpoint, sampler):
    """A mask for all rows, or one for each."""
    reference, _, model = random_checkpoint("pg2", 5)
    inputs = random_inputs(reference, ROWS[:2], 3)
    V = model.config.decoder.vocab_size
    low = np.arange(V) < 100
    each = generate.generate(model, inputs, 8, sampler=sampler, allowed=np.stack([low, ~low])).tokens
    assert (each[0] < 100).all() and (each[1][each[1] != 0] >= 100).all()
    assert (generate.generate(model, inputs, 8, sampler=sampler, allowed=low).tokens < 100).all()


def test_contradictions(random_checkpoint):
    reference, _, model = random_checkpoint("pg2", 5)
    inputs = random_inputs(reference, ROWS[:2], 3)
    V = model.config.decoder.vocab_size
    for wrong, message in [
        (dict(allowed=np.zeros(V, bool)), "allows no token"),
        (dict(allowed=np.stack([np.ones(V, bool), np.zeros(V, bool)])), "allows no token"),
        (dict(allowed=np.arange(V) == 1, min_new_tokens=1), "min_new_tokens forbids"),
        (dict(min_new_tokens=9), "min_new_tokens is 9"),
    ]:
        with pytest.raises(ValueError, match=message):
            generate.generate(model, inputs, 8, **wrong)
    stopping = [lambda early=early: Beam(early_stopping=early) for early in ("always", 1, np.True_)]  # type: ignore[arg-type]
    for wrong in (lambda: Beam(0), lambda: BestOf(0), *stopping):
        with pytest.raises(ValueError, match="makes no sense"):
            wrong()


def test_score_never_makes_the_logits(random_checkpoint):
    """In chunks of the vocabulary or at once: the same; the chunks need not divide it."""
    model = random_checkpoint("pg2", 5)[2]
    x = jax.random.normal(jax.random.key(0), (2, 3, model.config.decoder.hidden_size))
    tokens = jnp.array([[0, 499, 255], [256, 7, 499]])
    logits = model.decoder.logits(x, True)
    expected = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], axis=-1)[..., 0]
    for chunk in (499, 500, 128, 7):
        np.testing.assert_allclose(model.decoder.log_probabilities(x, tokens, True, chunk), expected, rtol=1e-5)
    wide, narrow = (
        jax.grad(lambda x, chunk=chunk: model.decoder.log_probabilities(x, tokens, True, chunk).sum())(x) for chunk in (500, 128)
    )  # fmt: skip
    np.testing.assert_allclose(narrow, wide, atol=1e-5)
    exact = jax.grad(lambda x: jnp.take_along_axis(jax.nn.log_softmax(model.decoder.logits(x, True)), tokens[..., None], -1).sum())(x)
    np.testing.assert_allclose(narrow, exact, atol=1e-5)


def test_fifty_random_filters(random_checkpoint):
    """Random settings, random logits of random sharpness, random prompts: the filtered logits of transformers' chain of processors."""
    reference, _, model = random_checkpoint("pg2", 5)
    rng = np.random.default_rng(0)
    for case in range(50):
        chances = {
            "temperature": float(rng.uniform(0.2, 2)), "top_k": int(rng.integers(1, 60)), "top_p": float(rng.uniform(0.05, 0.99)),
            "min_p": float(rng.uniform(0.001, 0.3)), "repetition_penalty": float(rng.uniform(0.8, 2)),
        }  # fmt: skip
        settings = {name: value for name, value in chances.items() if rng.random() < 0.6}
        logits = (rng.normal(size=(1, model.config.decoder.vocab_size)) * rng.uniform(1, 6)).astype(np.float32)
        inputs = random_inputs(reference, ((1, int(rng.integers(1, 20)), 0),), case)
        config = GenerationConfig(do_sample=True, **{"top_k": None} | settings)
        processors = reference._get_logits_processor(config, input_ids_seq_length=inputs.tokens.shape[1])
        expected = processors(torch.tensor(inputs.tokens).long(), torch.tensor(logits)).numpy()
        found = np.asarray(Sample(**settings).filter(jnp.asarray(logits), generate.seen_ids(model, inputs)))
        np.testing.assert_array_equal(np.isinf(found), np.isinf(expected), err_msg=str(settings))
        np.testing.assert_allclose(found, expected, rtol=1e-5, err_msg=str(settings))
