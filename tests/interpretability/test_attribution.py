"""Logit lens, saliency, rollout and pictures, against their definitions."""

from __future__ import annotations

from dataclasses import replace

import jax
import numpy as np
import pytest
from PIL import Image
from support.paths import DIGITS

import paligemma_jax as pg
from paligemma_jax.interpretability.attribution import rollout
from paligemma_jax.interpretability.pictures import overlay
from paligemma_jax.model.edits import Scale

PHOTO = str(DIGITS)


@pytest.fixture(scope="module")
def predictor():
    return pg.load("tiny")


@pytest.fixture(scope="module")
def generated(predictor):
    return predictor.generation_stages([PHOTO] * 2, ["ocr", "caption en"], attention=True)


def test_stages_of_generated_tokens_predict_them(predictor, generated):
    """The log-probabilities of the answer are those of the decoding loop."""
    answers, stages, inputs = generated
    plain = predictor.answers([PHOTO] * 2, ["ocr", "caption en"])
    log_probabilities = np.asarray(jax.nn.log_softmax(stages["logits"]))
    for row, answer in enumerate(answers):
        places = np.flatnonzero(inputs.targets[row])
        assert inputs.tokens[row, places].tolist() == answer.tokens == plain[row].tokens
        actual = log_probabilities[row, places - 1, answer.tokens]
        np.testing.assert_allclose(actual, answer.log_probabilities, atol=1e-5)


def test_generated_stages_can_be_edited(predictor):
    edit = {"decoder/layers/0/mlp/output": Scale(0)}
    (answer,), stages, inputs = predictor.generation_stages(PHOTO, "ocr", edit=edit)
    places = np.flatnonzero(inputs.targets[0])
    log_probabilities = np.asarray(jax.nn.log_softmax(stages["logits"]))[0, places - 1]
    np.testing.assert_allclose(
        log_probabilities[range(len(places)), answer.tokens], answer.log_probabilities, atol=1e-5
    )


def test_the_last_layer_of_the_lens_is_the_model(predictor):
    lens = predictor.logit_lens(PHOTO, "ocr", "4 3 2 3", k=3)
    logits, _ = predictor.logits(PHOTO, "ocr", "4 3 2 3")
    expected = np.sort(np.asarray(jax.nn.log_softmax(logits)))[..., -3:][..., ::-1]
    assert lens.tokens.shape == (5, *logits.shape[:2], 3)
    np.testing.assert_allclose(lens.log_probabilities[-1], expected, atol=1e-5)
    tokenizer = predictor.processor.tokenizer
    assert "".join(lens.texts(tokenizer)[-1]) == "4 3 2 3"
    assert lens.texts(tokenizer)[0] != lens.texts(tokenizer)[-1]


def test_saliency_is_the_gradient_of_the_score(predictor):
    """Against the change of the score along the gradient of one pixel."""
    inputs = predictor.processor(PHOTO, "ocr", "4 3 2 3")
    values = predictor.saliency(inputs)
    _, y, x = np.unravel_index(values.argmax(), values.shape)

    def score(pixel):
        images = inputs.images.copy()
        images[0, y, x] = pixel
        logits, _ = predictor.logits(replace(inputs, images=images))
        chosen = np.asarray(jax.nn.log_softmax(logits[0, :-1]), np.float64)
        chosen = np.take_along_axis(chosen, inputs.tokens[0, 1:, None], axis=1)[:, 0]
        return chosen[inputs.targets[0, 1:]].sum()

    pixel, step = inputs.images[0, y, x], 0.02
    sides = np.eye(3, dtype=np.float32) * step
    gradient = [(score(pixel + side) - score(pixel - side)) / (2 * step) for side in sides]
    assert values[0, y, x] == pytest.approx(np.linalg.norm(gradient), rel=0.05)


def test_rollout_multiplies_the_layers(generated):
    _, stages, _ = generated
    result = rollout(stages)
    np.testing.assert_allclose(result.sum(axis=-1), 1, atol=1e-4)
    row, identity = 1, np.eye(result.shape[-1])
    expected = identity
    for i in range(4):
        weights = np.asarray(stages[f"decoder/layers/{i}/attention/weights"][row], np.float64)
        expected = (0.5 * weights.mean(axis=0) + 0.5 * identity) @ expected
    np.testing.assert_allclose(result[row], expected, atol=1e-5)
    with pytest.raises(ValueError, match="attention weights of decoder, got none"):
        rollout({"logits": np.zeros((1, 2))})


def test_images_and_texts_are_embedded_as_the_decoder_reads_them(predictor):
    features = predictor.embed_images([PHOTO] * 3, batch_size=2)
    stages = predictor.stages(PHOTO, "ocr", only=["vision/output", "projector", ".*/embeddings"])
    np.testing.assert_allclose(features.encoded[2], stages["vision/output"][0], atol=1e-5)
    np.testing.assert_allclose(features.projected[2], stages["projector"][0], atol=1e-5)
    (text,) = predictor.embed_texts("ocr")
    embedded = stages["decoder/embeddings"][0]  # image, bos, text, newline
    np.testing.assert_allclose(embedded[-1 - len(text) : -1], text, atol=1e-6)


def test_an_overlay_is_warm_where_the_map_is_high():
    image = Image.new("RGB", (80, 40), "white")
    patches = np.zeros(16)
    patches[3] = 1  # the top right corner
    picture = np.asarray(overlay(image, patches), int)
    assert (picture[2, 78] - picture[35, 5])[2] < -100 and picture.shape == (40, 80, 3)
    for wrong in (np.zeros(15), np.zeros((2, 2, 2)), np.zeros((0, 4))):
        with pytest.raises(ValueError, match="values must be"):
            overlay(image, wrong)


def test_text_alone_has_no_saliency(predictor):
    inputs = predictor.processor(PHOTO, "ocr", "4")
    text = inputs.tokens[0] != predictor.config.image_token_id
    names = ("tokens", "valid", "prefix", "targets")
    fields = {name: getattr(inputs, name)[:, text] for name in names}
    with pytest.raises(ValueError, match="saliency needs images, got text alone"):
        predictor.saliency(pg.Inputs(images=None, **fields))
