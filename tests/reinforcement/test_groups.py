"""Sampled groups: the sampler and the trainer agree on every log-probability."""

from __future__ import annotations

import numpy as np
import pytest
from support.on_devices import call

import paligemma_jax as pg
from paligemma_jax.reinforcement.groups import sample_groups
from paligemma_jax.reinforcement.rollouts import score_groups

PROMPTS = ["ocr", "answer en how many digits?", "detect 3"]
GROUP = 4


@pytest.fixture(scope="module")
def sampled():
    predictor = pg.load("tiny", dtype="float32")
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 255, (56, 56, 3), np.uint8) for _ in PROMPTS]
    processor = predictor.processor
    pixels = processor.pixel_values(images)[:, None]
    prompts = processor.encode(images, PROMPTS)
    groups, answers = sample_groups(
        predictor.model, processor, prompts, pixels, GROUP, 12, np.arange(3)
    )
    return predictor, images, groups, answers


def test_ratios_are_one_before_the_first_update(sampled):
    predictor, _, groups, _ = sampled
    scored, mask = map(np.asarray, score_groups(predictor.model, groups))
    assert mask.sum() == groups.inputs.targets.sum() > 30
    np.testing.assert_allclose(np.exp(scored - groups.log_probabilities), 1, atol=1e-5)
    assert (groups.log_probabilities[mask] < 0).mean() > 0.9


def test_rows_contain_what_was_sampled(sampled):
    predictor, _, groups, answers = sampled
    inputs, tokenizer = groups.inputs, predictor.processor.tokenizer
    for row, answer in enumerate(answers):
        targets = inputs.tokens[row, inputs.targets[row]].tolist()
        assert tokenizer.decode(targets) == answer
        assert len(targets) == 12 or targets[-1] == tokenizer.eos_id
        prompt = tokenizer.decode(inputs.tokens[row, inputs.prefix[row]].tolist())
        assert prompt.strip() == PROMPTS[row // GROUP]
    assert len(set(answers[:GROUP])) > 1


def test_the_first_of_a_group_is_the_answer_of_the_sampler(sampled):
    predictor, images, _, answers = sampled
    options = dict(max_new_tokens=12, sampler=pg.Sample(), seeds=[0, 1, 2])
    assert predictor.generate(images, PROMPTS, **options) == answers[::GROUP]


@pytest.mark.slow
def test_eight_devices_equal_one():
    errors = call(8, "group_errors", "data=2,fsdp=2,tensor=2")
    assert errors["same_tokens"]
    assert errors["ratio"] < 1e-5 and errors["loss"] < 1e-5 and errors["gradients"] < 1e-4
