"""Beam search, best-of-n and the other decoding options, against transformers or arithmetic."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from support.decoding import seen_ids, tokens_of
from support.hf_models import hf_inputs, random_inputs
from support.rows import replace_config
from transformers import GenerationConfig

from paligemma_jax.inference import generate, scoring
from paligemma_jax.inference.options import DecodingOptions
from paligemma_jax.inference.sampling import Beam, BestOf, Greedy, Sample

ROWS = [(1 + i % 2, 1 + i, 0) for i in range(10)]
EOS = tuple(range(7, 450, 9))  # enough for answers of random models to end at different lengths
BEAMS = [Beam(2), Beam(4, 0.5), Beam(3, 2.0, True), Beam(4, -1.0), Beam(3, 1.0, "never"), Beam(1)]


def decode(model, inputs, max_new_tokens, sampler, **options):
    seeds = options.pop("seeds", None)
    options = DecodingOptions(max_new_tokens, sampler, **options)
    return generate.generate(model, inputs, options, seeds=seeds)


@pytest.mark.parametrize("beam", BEAMS, ids=lambda beam: str(beam)[5:-1])
def test_beam_search_gives_the_sequences_and_scores_of_transformers(random_checkpoint, beam):
    """Ten prompts per setting, whose answers end at different lengths."""
    reference, _, model = random_checkpoint("pg2", 5)
    inputs = random_inputs(reference, ROWS, 3, order="mixed")
    model = replace_config(model, eos_token_ids=EOS)
    result = decode(model, inputs, 12, beam)
    out = reference.generate(
        **hf_inputs(inputs),
        max_new_tokens=12,
        do_sample=False,
        num_beams=beam.width,
        length_penalty=beam.length_penalty,
        early_stopping=beam.early_stopping,
        eos_token_id=list(EOS),
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    sequences = out.sequences[:, inputs.tokens.shape[1] :].numpy()
    ends = set()
    for row, expected in zip(result.tokens, sequences, strict=True):
        end = next((i + 1 for i, token in enumerate(expected) if token in EOS), len(expected))
        ends.add(end)
        np.testing.assert_array_equal(row[:end], expected[:end])
        # transformers pads with `pad_token_id or eos_token_id`, which is eos because pad is 0.
        assert not row[end:].any()
    assert len(ends) > 1
    if beam.width > 1:
        scores = out.sequences_scores.numpy()
        np.testing.assert_allclose(result.scores, scores, rtol=2e-5, atol=1e-5)


def test_log_probabilities_are_those_of_a_teacher_forced_pass(random_checkpoint):
    """This includes every token, for any filter or strategy."""
    reference, _, model = random_checkpoint("pg2", 5)
    inputs = random_inputs(reference, ROWS[:3], 3)
    for sampler in (Sample(temperature=0.7, top_k=9), Beam(3), BestOf(3)):
        result = decode(model, inputs, 8, sampler)
        logits = scoring.forward(model, with_answer(inputs, result.tokens))
        log_p = np.asarray(jax.nn.log_softmax(logits))[:, inputs.tokens.shape[1] - 1 : -1]
        expected = np.take_along_axis(log_p, result.tokens[..., None], axis=2)[..., 0]
        expected = expected * (result.tokens != 0)
        np.testing.assert_allclose(result.log_probabilities, expected, atol=2e-4)
        if not isinstance(sampler, Beam):
            sums = result.log_probabilities.sum(1)
            np.testing.assert_allclose(result.scores, sums, rtol=1e-6)


def test_beam_search_returns_the_ranked_answers_of_transformers(random_checkpoint):
    """With the most likely tokens in the place of each token, as in a teacher-forced pass."""
    reference, _, model = random_checkpoint("pg2", 5)
    inputs = random_inputs(reference, ROWS[:4], 3, order="mixed")
    model = replace_config(model, eos_token_ids=EOS)
    beam = Beam(4, 0.5, num_return=3)
    result = decode(model, inputs, 12, beam, top_log_probabilities=2)
    out = reference.generate(
        **hf_inputs(inputs),
        max_new_tokens=12,
        do_sample=False,
        num_beams=beam.width,
        num_return_sequences=beam.num_return,
        length_penalty=beam.length_penalty,
        eos_token_id=list(EOS),
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    expected = out.sequences[:, inputs.tokens.shape[1] :].numpy()
    is_eos = np.isin(expected, EOS)
    keep = np.cumsum(is_eos, axis=1) <= is_eos  # transformers pads with eos
    np.testing.assert_array_equal(result.tokens, np.where(keep, expected, 0))
    np.testing.assert_allclose(result.scores, out.sequences_scores, rtol=2e-5, atol=1e-5)
    for rank in range(beam.num_return):
        rows = slice(rank, None, beam.num_return)
        logits = scoring.forward(model, with_answer(inputs, result.tokens[rows]))
        log_p = jax.nn.log_softmax(logits)[:, inputs.tokens.shape[1] - 1 : -1]
        values, ids = jax.lax.top_k(log_p, 2)
        kept = keep[rows]
        np.testing.assert_array_equal(result.top.ids[rows][kept], ids[kept])
        actual = result.top.log_probabilities[rows][kept]
        np.testing.assert_allclose(actual, values[kept], atol=2e-4)


def test_logits_of_each_token_are_those_of_transformers(random_checkpoint):
    """Before any filter; `top` has the most likely tokens of them."""
    reference, _, model = random_checkpoint("pg2", 5)
    inputs = random_inputs(reference, ROWS[:3], 3)
    result = decode(model, inputs, 8, Greedy(), logits=True, top_log_probabilities=5)
    out = reference.generate(
        **hf_inputs(inputs),
        max_new_tokens=8,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    expected = np.stack([step.numpy() for step in out.logits], axis=1)
    assert result.logits.shape == expected.shape == (3, 8, model.config.decoder.vocab_size)
    largest = np.abs(expected).max()  # 20; the difference is 2.4e-6 of it
    assert np.abs(result.logits - expected).max() < 5e-6 * largest
    values, ids = jax.lax.top_k(jax.nn.log_softmax(result.logits), 5)
    np.testing.assert_array_equal(result.top.ids, ids)
    np.testing.assert_allclose(result.top.log_probabilities, values, atol=1e-5)
    np.testing.assert_allclose(result.log_probabilities, values[..., 0], atol=1e-5)


def test_logits_of_each_token_are_those_before_any_mask(random_checkpoint):
    """The first token is chosen by the same logits, whatever is allowed."""
    reference, _, model = random_checkpoint("pg2", 5)
    inputs = random_inputs(reference, ROWS[:3], 3)
    few = np.arange(model.config.decoder.vocab_size) % 40 == 7
    free, masked = (
        decode(model, inputs, 2, Greedy(), logits=True, top_log_probabilities=3, allowed=allowed)
        for allowed in (None, few)
    )
    assert few[masked.tokens].all() and not few[free.tokens].all()
    np.testing.assert_array_equal(masked.logits[:, 0], free.logits[:, 0])
    np.testing.assert_array_equal(masked.top.ids[:, 0], free.top.ids[:, 0])
    assert np.isfinite(masked.logits).all()


def test_best_of_returns_its_samples_by_score(random_checkpoint):
    """All of them are the samples that the best is chosen from, with what belongs to each."""
    reference, _, model = random_checkpoint("pg2", 5)
    inputs = random_inputs(reference, ROWS[:2], 3)
    sampler = Sample(temperature=1.5)
    options = dict(seeds=np.array([6, 7]), logits=True)
    result = decode(model, inputs, 6, BestOf(4, sampler, num_return=3), **options)
    every = decode(model, inputs, 6, BestOf(4, sampler, num_return=4), **options)
    scores = result.scores.reshape(2, 3)
    assert (np.diff(scores) <= 0).all() and len(set(scores.ravel().tolist())) > 2
    for name in ("tokens", "scores", "logits"):
        rows = getattr(every, name)[[0, 1, 2, 4, 5, 6]]
        np.testing.assert_array_equal(getattr(result, name), rows)
    log_p = jax.nn.log_softmax(result.logits)
    chosen = np.take_along_axis(np.asarray(log_p), result.tokens[..., None], axis=2)[..., 0]
    np.testing.assert_allclose(chosen.sum(1), result.scores, rtol=1e-5)


def with_answer(inputs, tokens):
    all_true = np.ones_like(tokens, bool)
    answer = dict(tokens=tokens, valid=all_true, prefix=~all_true, targets=all_true)
    fields = {
        name: np.concatenate([getattr(inputs, name), values], axis=1)
        for name, values in answer.items()
    }
    return type(inputs)(images=inputs.images, **fields)


def test_best_of_is_the_best_of_its_samples(random_checkpoint):
    """The choice in a row does not depend on other rows."""
    reference, _, model = random_checkpoint("pg2", 5)
    inputs = random_inputs(reference, ROWS[:2], 3)
    sampler, seeds = Sample(temperature=1.5), np.array([6, 7])
    best = decode(model, inputs, 6, BestOf(8, sampler), seeds=seeds)
    first = decode(model, inputs, 6, BestOf(1, sampler), seeds=seeds)
    assert (best.scores >= first.scores).all() and (best.scores > first.scores).any()
    again = decode(model, inputs, 6, BestOf(8, sampler), seeds=np.array([6, 9]))
    np.testing.assert_array_equal(again.tokens[0], best.tokens[0])


@pytest.mark.parametrize("sampler", [Greedy(), Beam(3)], ids=["greedy", "beam"])
def test_no_eos_comes_before_min_new_tokens_as_in_transformers(random_checkpoint, sampler):
    reference, _, model = random_checkpoint("pg2", 5)
    inputs = random_inputs(reference, ROWS, 3, order="mixed")
    model = replace_config(model, eos_token_ids=EOS)
    tokens = decode(model, inputs, 12, sampler, min_new_tokens=6).tokens
    expected = reference.generate(
        **hf_inputs(inputs),
        max_new_tokens=12,
        min_new_tokens=6,
        do_sample=False,
        num_beams=getattr(sampler, "width", 1),
        eos_token_id=list(EOS),
        pad_token_id=0,
    )[:, inputs.tokens.shape[1] :].numpy()
    is_eos = np.isin(expected, EOS)
    after_first = np.cumsum(is_eos, axis=1) > is_eos  # where transformers pads with eos
    expected = np.where(after_first, 0, expected)
    np.testing.assert_array_equal(tokens[:, : expected.shape[1]], expected)
    assert not np.isin(tokens[:, :6], EOS).any()


@pytest.mark.parametrize(
    "sampler", [Sample(), Beam(2), BestOf(2)], ids=["sample", "beam", "best of"]
)
def test_allowed_is_a_mask_for_all_rows_or_one_per_row(random_checkpoint, sampler):
    reference, _, model = random_checkpoint("pg2", 5)
    inputs = random_inputs(reference, ROWS[:2], 3)
    low = np.arange(model.config.decoder.vocab_size) < 100
    first, second = tokens_of(model, inputs, 8, sampler=sampler, allowed=np.stack([low, ~low]))
    assert (first < 100).all() and (second[second != 0] >= 100).all()
    assert (tokens_of(model, inputs, 8, sampler=sampler, allowed=low) < 100).all()


def test_contradictory_options_are_refused(random_checkpoint):
    reference, _, model = random_checkpoint("pg2", 5)
    inputs = random_inputs(reference, ROWS[:2], 3)
    V = model.config.decoder.vocab_size
    nothing_in_one_row = np.stack([np.ones(V, bool), np.zeros(V, bool)])
    for options, message in [
        (dict(allowed=np.zeros(V, bool)), "allowed must permit at least one token"),
        (dict(allowed=nothing_in_one_row), "allowed must permit at least one token"),
        (dict(allowed=np.arange(V) == 1, min_new_tokens=1), "permit a token besides eos"),
        (dict(min_new_tokens=9), r"min_new_tokens must be an integer from 0 .*\(8\), got 9"),
    ]:
        with pytest.raises(ValueError, match=message):
            tokens_of(model, inputs, 8, **options)
    for make in (Beam, lambda width: BestOf(width)):
        with pytest.raises(ValueError, match="width must be a positive integer, got 0"):
            make(0)
    for early in ("always", 1, np.True_):
        with pytest.raises(ValueError, match=r"Beam.early_stopping must be True, False or 'never'"):
            Beam(early_stopping=early)  # type: ignore[arg-type]


def test_log_probabilities_in_chunks_equal_those_of_all_logits(random_checkpoint):
    """Values and gradients, whether or not the chunk size divides the vocabulary."""
    model = random_checkpoint("pg2", 5)[2]
    decoder = model.decoder
    x = jax.random.normal(jax.random.key(0), (2, 3, model.config.decoder.hidden_size))
    tokens = jnp.array([[0, 499, 255], [256, 7, 499]])

    def direct(x):
        log_p = jax.nn.log_softmax(decoder.logits(x, True))
        return jnp.take_along_axis(log_p, tokens[..., None], axis=-1)[..., 0]

    for chunk in (499, 500, 128, 7):
        chunked = decoder.log_probabilities(x, tokens, True, chunk)
        np.testing.assert_allclose(chunked, direct(x), rtol=1e-5)
    wide, narrow = (
        jax.grad(lambda x, n=chunk: decoder.log_probabilities(x, tokens, True, n).sum())(x)
        for chunk in (500, 128)
    )
    np.testing.assert_allclose(narrow, wide, atol=1e-5)
    exact = jax.grad(lambda x: direct(x).sum())(x)
    np.testing.assert_allclose(narrow, exact, atol=1e-5)


def test_filters_equal_the_logits_processors_of_transformers(random_checkpoint):
    """Fifty random settings, with random logits of random sharpness, and random prompts."""
    reference, _, model = random_checkpoint("pg2", 5)
    rng = np.random.default_rng(0)
    for case in range(50):
        values = {
            "temperature": float(rng.uniform(0.2, 2)),
            "top_k": int(rng.integers(1, 60)),
            "top_p": float(rng.uniform(0.05, 0.99)),
            "min_p": float(rng.uniform(0.001, 0.3)),
            "repetition_penalty": float(rng.uniform(0.8, 2)),
        }
        settings = {name: value for name, value in values.items() if rng.random() < 0.6}
        logits = rng.normal(size=(1, model.config.decoder.vocab_size)) * rng.uniform(1, 6)
        logits = logits.astype(np.float32)
        inputs = random_inputs(reference, ((1, int(rng.integers(1, 20)), 0),), case)
        config = GenerationConfig(do_sample=True, **{"top_k": None} | settings)
        length = inputs.tokens.shape[1]
        processors = reference._get_logits_processor(config, input_ids_seq_length=length)
        ids = torch.tensor(inputs.tokens).long()
        expected = processors(ids, torch.tensor(logits)).numpy()
        seen = seen_ids(model, inputs)
        filtered = np.asarray(Sample(**settings).filter(jnp.asarray(logits), seen))
        np.testing.assert_array_equal(np.isinf(filtered), np.isinf(expected), err_msg=str(settings))
        np.testing.assert_allclose(filtered, expected, rtol=1e-5, err_msg=str(settings))
