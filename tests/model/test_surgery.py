"""Another attention rule, packed rows, another image encoder."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.paths import DIGITS

import paligemma_jax as pg
from paligemma_jax.inference import scoring
from paligemma_jax.model.config import VisionConfig
from paligemma_jax.model.layers import Linear
from paligemma_jax.model.masks import prefix_lm_mask
from paligemma_jax.model.surgery import with_mask, with_vision
from paligemma_jax.model.vision import patches

PHOTO = str(DIGITS)


@pytest.fixture(scope="module")
def predictor():
    return pg.load("tiny")


def causal(queries, keys, window):
    """No token sees a later one, in the prompt either."""
    return (keys.positions[:, None] <= queries.positions[:, :, None]) & keys.valid[:, None]


def without_most_of_the_image(queries, keys, window):
    """The published rule, but nothing attends to positions 4 to 39, of the image."""
    hidden = (keys.positions >= 4) & (keys.positions < 40)
    return prefix_lm_mask(queries, keys, window) & ~hidden[:, None]


def test_a_causal_rule_is_a_prompt_without_prefix(predictor):
    inputs = predictor.processor([PHOTO] * 2, ["ocr", "answer en how many?"], ["4 3", "four"])
    config = predictor.config
    no_window = replace(config, decoder=replace(config.decoder, sliding_window=None))
    plain = pg.load("tiny").model
    plain.config = no_window
    plain.decoder.config = no_window.decoder
    expected = scoring.forward(plain, replace(inputs, prefix=inputs.prefix & False))
    actual = scoring.forward(with_mask(predictor.model, causal), inputs)
    rows = inputs.valid
    np.testing.assert_allclose(np.asarray(actual)[rows], np.asarray(expected)[rows], atol=1e-4)


@pytest.mark.parametrize("layers", ["list", "stack"])
@pytest.mark.thorough
def test_a_rule_holds_in_generation_too(layers):
    loaded = pg.load("tiny", layers=layers)
    changed = replace(loaded, model=with_mask(loaded.model, without_most_of_the_image))
    (answer,), stages, inputs = changed.generation_stages(
        PHOTO, "ocr", only="logits", max_new_tokens=6
    )
    places = np.flatnonzero(inputs.targets[0]) - 1
    values = np.asarray(jax.nn.log_softmax(stages["logits"][0, places]))
    actual = values[range(len(places)), answer.tokens]
    np.testing.assert_allclose(actual, answer.log_probabilities, atol=1e-4)
    (plain,) = loaded.answers(PHOTO, "ocr", 6)
    assert plain.tokens != answer.tokens


def test_a_rule_of_another_shape_is_one_sentence(predictor):
    inputs = predictor.processor(PHOTO, "ocr")
    for rule, got in {
        (lambda q, k, w: jnp.ones((1, 3), bool)): r"got bool\[1, 3\]",
        (lambda q, k, w: prefix_lm_mask(q, k, w) * 1.0): r"got float32",
    }.items():
        with pytest.raises(ValueError, match=rf"a mask rule must return bool\[1, .*{got}"):
            scoring.forward(with_mask(predictor.model, rule), inputs)
    with pytest.raises(ValueError, match="needs a model with a decoder"):
        with_mask(predictor.model.vision, causal)


def test_packed_examples_equal_their_own_rows(predictor):
    """Three examples in one row, each with its image, prompt and answer."""
    prompts, answers = ["ocr", "answer en how many digits?", "detect 4"], ["4 3", "four", "none"]
    alone = [
        predictor.processor(PHOTO, prompt, answer)
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    fields = {
        name: np.concatenate([getattr(row, name) for row in alone], axis=1)
        for name in ("tokens", "valid", "prefix")
    }
    lengths = [row.tokens.shape[1] for row in alone]
    segments = np.repeat(np.arange(3), lengths)[None]
    images = np.concatenate([row.images for row in alone])[None]
    packed = predictor.model(
        jnp.asarray(fields["tokens"]),
        jnp.asarray(images),
        jnp.asarray(fields["valid"]),
        jnp.asarray(fields["prefix"]),
        jnp.asarray(segments),
    )
    expected = np.concatenate([scoring.forward(predictor.model, row)[0] for row in alone])
    np.testing.assert_allclose(packed[0], expected, atol=2e-4)


class Patches(nnx.Module):
    """The smallest image encoder: one projection of each patch."""

    def __init__(self, width: int, size: int, rngs: nnx.Rngs):
        self.size = size
        self.project = Linear("WU", (width, size * size * 3), bias=True, rngs=rngs)

    def __call__(self, images):
        return self.project(patches(images, self.size))


def test_another_image_encoder_answers_and_trains(predictor):
    rngs, vision = nnx.Rngs(0), VisionConfig(image_size=56, patch_size=14)
    model = with_vision(predictor.model, Patches(24, 14, rngs), vision, rngs)
    processor = replace(predictor.processor, image_size=56, image_tokens=16)
    changed = replace(predictor, model=model, processor=processor)
    assert isinstance(changed.generate(PHOTO, "ocr", 4)[0], str)
    assert model.config.vision.hidden_size == 24
    inputs = jax.tree.map(jnp.asarray, processor(PHOTO, "ocr", "4 3"))

    def loss(model):
        return -model(inputs.tokens, inputs.images, inputs.valid, inputs.prefix)[0, -2, 1]

    gradient = jax.grad(loss)(model)
    assert np.abs(gradient.vision.project.kernel[...]).max() > 0
    assert predictor.generate(PHOTO, "ocr") == ["4 3 2 3"]  # the original is as before
    wrong = VisionConfig(image_size=56, patch_size=28)
    with pytest.raises(ValueError, match=r"must return \[M, 4, W\] .* got \['M', 16, 24\]"):
        with_vision(predictor.model, Patches(24, 14, rngs), wrong, rngs)
