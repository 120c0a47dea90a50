"""What can be answered besides one image per prompt: text alone, `Inputs`, an image for many."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec

import jax
import numpy as np
import pytest
from support.paths import DIGITS
from support.refusals import predictor as golden_predictor

import paligemma_jax as pg
from paligemma_jax.inference import batching

PHOTO = str(DIGITS)


@pytest.fixture(scope="module")
def predictor():
    return pg.load("tiny")


def test_text_alone_is_answered_and_scored_by_its_logits(predictor):
    logits, inputs = predictor.logits(None, "2 + 3", "5")
    assert inputs.images is None
    values = np.asarray(jax.nn.log_softmax(logits[0, :-1]))
    chosen = np.take_along_axis(values, inputs.tokens[0, 1:, None], axis=1)[:, 0]
    (score,) = predictor.score(None, "2 + 3", "5")
    assert score == pytest.approx(chosen[inputs.targets[0, 1:]].sum(), abs=1e-4)
    first = predictor.logits(None, "2 + 3")[0][0, -1].argmax()
    for batch in (["2 + 3"], ["2 + 3", "a longer prompt"]):
        answer = predictor.answers(None, batch, 3)[0]
        assert answer.tokens[0] == first
    assert "".join(predictor.stream(None, "2 + 3", 3)) == answer.text


def test_text_and_images_mix_in_one_call(predictor):
    images, prompts = [PHOTO, None, PHOTO], ["ocr", "2 + 3", "caption en"]
    together = predictor.answers(images, prompts, 6)
    for image, prompt, answer in zip(images, prompts, together, strict=True):
        (alone,) = predictor.answers(image, prompt, 6)
        assert answer.tokens == alone.tokens


@pytest.mark.skipif(find_spec("torch") is None, reason="torch is not installed")
def test_text_alone_equals_transformers(random_checkpoint):
    """The language model on the same ids, which all attend to each other."""
    import torch

    reference, _, model = random_checkpoint("pg2", 1)
    predictor = replace(golden_predictor(), model=model)
    logits, inputs = predictor.logits(None, "a text")
    ids = torch.tensor(np.asarray(inputs.tokens), dtype=torch.long)
    with torch.no_grad():
        expected = reference(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            token_type_ids=torch.zeros_like(ids),
            labels=torch.full_like(ids, -100),
        ).logits
    assert np.abs(logits - expected.numpy()).max() < 1.2e-5 * np.abs(logits).max()


@pytest.mark.parametrize("side", ["left", "right"])
def test_inputs_are_answered_as_their_prompts(predictor, side):
    prompts = ["ocr", "answer en how many digits?"]
    inputs = predictor.processor(PHOTO, prompts, padding_side=side)
    expected = predictor.answers(PHOTO, prompts, 8)
    actual = predictor.answers(inputs, max_new_tokens=8)
    assert [a.tokens for a in actual] == [a.tokens for a in expected]
    assert predictor.generate(inputs, max_new_tokens=8) == [a.text for a in expected]
    scored = predictor.processor(PHOTO, prompts, ["4", "four"], padding_side=side)
    expected = predictor.score(PHOTO, prompts, ["4", "four"])
    np.testing.assert_allclose(predictor.score(scored), expected, atol=1e-5)


def test_an_image_for_many_prompts_is_encoded_once(predictor, monkeypatch):
    calls = []

    def encode(model, images, edits):
        calls.append(len(images))
        return original(model, images, edits)

    original = batching.encode_images
    monkeypatch.setattr(batching, "encode_images", encode)
    texts = predictor.generate(PHOTO, ["ocr", "caption en", "ocr"], 6, batch_size=2)
    assert calls == [1] and texts[0] == texts[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("inputs", "ocr"), "prompts must be left out with Inputs"),
        (("scored",), "Inputs to answer must have no targets"),
        ((PHOTO,), "no prompts: pass images and prompts, or Inputs"),
        (([PHOTO], ["a", "b"]), "got 1 images for 2 prompts"),
        ((None, "<image>ocr"), "0 images for \\[1\\] <image> in the prompts"),
    ],
)
def test_what_does_not_fit_is_one_sentence(predictor, arguments, message):
    made = {
        "inputs": predictor.processor(PHOTO, "ocr"),
        "scored": predictor.processor(PHOTO, "ocr", "4"),
    }
    first = made.get(arguments[0], arguments[0]) if isinstance(arguments[0], str) else arguments[0]
    with pytest.raises(ValueError, match=message) as error:
        predictor.generate(first, *arguments[1:])
    assert "\n" not in str(error.value)
