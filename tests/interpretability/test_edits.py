"""Edits reach every program, and only for the call that has them."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from support.dense import dense_model
from support.on_devices import call
from support.paths import DIGITS

import paligemma_jax as pg
from paligemma_jax.inference import decoding
from paligemma_jax.model.edits import AblateHeads, Add, Patch, Scale

PHOTO = str(DIGITS)
LAYER = "decoder/layers/1"
EDIT = {
    f"{LAYER}/attention/heads": AblateHeads((0, 2)),
    "vision/layers/2/mlp/output": Scale(0.5),
    "decoder/layers/2": Add(np.linspace(-8, 8, 160, dtype=np.float32)),
}


@pytest.fixture(scope="module")
def predictor():
    return pg.load("tiny")


@pytest.fixture(scope="module")
def direction():
    return np.random.default_rng(0).normal(size=160).astype(np.float32) * 2


def greedy_by_full_passes(predictor, prompt, count, edit):
    """Tokens by one complete pass for each: no cache, no compiled loop."""
    inputs = predictor.processor(PHOTO, prompt)
    tokens = []
    for _ in range(count):
        logits, _ = predictor.logits(inputs, edit=edit)
        tokens.append(int(logits[0, -1].argmax()))
        row = np.array([[tokens[-1]]], np.int32)
        inputs = replace(
            inputs,
            tokens=np.concatenate([inputs.tokens, row], axis=1),
            valid=np.pad(inputs.valid, [(0, 0), (0, 1)], constant_values=True),
            prefix=np.pad(inputs.prefix, [(0, 0), (0, 1)]),
            targets=np.pad(inputs.targets, [(0, 0), (0, 1)]),
        )
    return tokens


@pytest.mark.thorough
def test_generation_is_edited_at_every_step(predictor):
    expected = greedy_by_full_passes(predictor, "ocr", 4, EDIT)
    (answer,) = predictor.answers(PHOTO, "ocr", 4, edit=EDIT)
    (plain,) = predictor.answers(PHOTO, "ocr", 4)
    assert answer.tokens == expected[: len(answer.tokens)] and answer.tokens != plain.tokens
    (beam,) = predictor.answers(PHOTO, "ocr", 4, pg.Beam(1), edit=EDIT)
    assert beam.tokens == answer.tokens
    assert "".join(predictor.stream(PHOTO, "ocr", 4, edit=EDIT)) == answer.text


def test_nothing_is_left_of_an_edit(predictor):
    """Neither in results nor in compiled programs: another value compiles nothing."""
    before = predictor.answers(PHOTO, "ocr")[0].log_probabilities
    predictor.generate(PHOTO, "ocr", edit={LAYER: Scale(0.5)})
    programs = decoding.prefill._cache_size(), decoding.decode._cache_size()
    predictor.generate(PHOTO, "ocr", edit={LAYER: Scale(0.25)})
    assert predictor.answers(PHOTO, "ocr")[0].log_probabilities == before
    assert (decoding.prefill._cache_size(), decoding.decode._cache_size()) == programs


def test_scores_and_logits_agree_under_an_edit(predictor):
    inputs = predictor.processor(PHOTO, "ocr", "4 3 2 3")
    for edit in ({}, EDIT):
        logits, _ = predictor.logits(inputs, edit=edit)
        log_probabilities = np.asarray(jax.nn.log_softmax(logits[0, :-1]))
        chosen = np.take_along_axis(log_probabilities, inputs.tokens[0, 1:, None], axis=1)[:, 0]
        expected = chosen[inputs.targets[0, 1:]].sum()
        (score,) = predictor.score(PHOTO, "ocr", "4 3 2 3", edit=edit)
        assert score == pytest.approx(expected, abs=1e-4)


def test_a_patch_from_another_run_carries_over(predictor):
    """The last layer of one run in another gives its logits; at one position, there only."""
    blank = Image.new("RGB", (112, 112), "white")
    a, b = (predictor.processor(image, "ocr", "4 3") for image in (PHOTO, blank))
    name = "decoder/layers/3"
    other = predictor.stages(b, only=name)[name]
    expected, _ = predictor.logits(b)
    patched, _ = predictor.logits(a, edit={name: other})
    np.testing.assert_allclose(patched, expected, atol=1e-4)
    where = np.arange(a.tokens.shape[1]) == 70
    at_one, _ = predictor.logits(a, edit={name: Patch(other, where[None])})
    np.testing.assert_allclose(at_one[:, 70], expected[:, 70], atol=1e-4)
    plain, _ = predictor.logits(a)
    np.testing.assert_array_equal(at_one[:, :70], plain[:, :70])


def test_an_attention_map_can_be_edited(predictor):
    """With all weight on the first token, heads are its values."""
    name = f"{LAYER}/attention/weights"
    edit = {name: lambda weights: jnp.zeros_like(weights).at[..., 0].set(1)}
    wanted = [f"{LAYER}/attention/{part}" for part in ("heads", "v")]
    stages = predictor.stages(PHOTO, "ocr", "4 3", only=wanted, edit=edit)
    values = np.repeat(stages[f"{LAYER}/attention/v"][:, :1], 2, axis=2)
    heads = stages[f"{LAYER}/attention/heads"]
    np.testing.assert_allclose(heads, np.broadcast_to(values, heads.shape), atol=1e-6)


def edited_results(predictor):
    """Log-probabilities of a sampled answer's tokens, and a score, with an edit."""
    options = dict(sampler=pg.Sample(0.8), max_new_tokens=6, edit=EDIT)
    (answer,) = predictor.answers([PHOTO], ["ocr"], **options)
    (score,) = predictor.score(PHOTO, "ocr", "4 3 2 3", edit=EDIT)
    return [*answer.log_probabilities, float(score)]


@pytest.mark.thorough
def test_stacked_layers_and_devices_give_the_same(predictor):
    expected = edited_results(predictor)
    stacked = edited_results(pg.load("tiny", layers="stack"))
    np.testing.assert_allclose(stacked, expected, atol=5e-5)
    sharded = call(8, "edited_results", "data=2,fsdp=2,tensor=2")
    np.testing.assert_allclose(sharded, expected, atol=5e-5)


def test_a_quantized_model_is_edited_as_the_model_of_its_weights(predictor):
    quantized = pg.load("tiny", quantize="int8")
    plain = replace(predictor, model=dense_model(quantized.model, predictor.model))
    np.testing.assert_allclose(edited_results(quantized), edited_results(plain), atol=1e-4)


NAMES = "must name stages of the model, got"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"decoder/layer/3": Scale(0)}, f"edit {NAMES} 'decoder/layer/3'; near it: decoder/"),
        ({"decoder/layers/9": Scale(0)}, f"edit {NAMES} 'decoder/layers/9'; near it: decoder/"),
        ({"(": Scale(0)}, "edit must have stage names or regular expressions, got '('"),
        ({3: Scale(0)}, "edit must have stage names or regular expressions, got 3"),
        ({LAYER: 3}, f"the edit of {LAYER} must be an array or a function of one, got 3"),
        ([LAYER], f"edit must be a dict from stage names to changes, got ['{LAYER}']"),
        ({LAYER: np.zeros(3)}, f"the edit of {LAYER} does not fit its shape [1, 96, 160]"),
        ({LAYER: np.zeros((2, 1, 160))}, "must be the same for all rows here, got [2, 1, 160]"),
        ({LAYER: lambda x: x[:1, 0]}, "must return [1, 96, 160], got [1, 160]"),
        ({f"{LAYER}/attention/heads": AblateHeads((4,))}, "heads must be from 0 to 3, got (4,)"),
        ({LAYER: lambda x: x + np.zeros(7)}, f"the edit of {LAYER} does not fit its shape"),
    ],
)
def test_an_edit_that_does_not_fit_is_one_sentence(predictor, edit, message):
    with pytest.raises(ValueError) as error:
        predictor.generate(PHOTO, "ocr", edit=edit)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_scores_have_no_stage_logits(predictor):
    with pytest.raises(ValueError, match=f"edit {NAMES} 'logits'"):
        predictor.score(PHOTO, "ocr", "4", edit={"logits": Scale(2.0)})


def test_only_computes_what_it_names(predictor):
    inputs = predictor.processor([PHOTO] * 3, ["ocr", "caption en", "detect 4"], ["4", "3", "2"])
    everything = predictor.stages(inputs, attention=True, branches=True)
    names = predictor.stage_names()
    assert [name for name in names if name in everything] == list(everything)
    only = [r"decoder/layers/\d", "decoder/layers/0/attention/scores"]
    some = predictor.stages(inputs, only=only, batch_size=2)
    assert {*some} == {*(f"decoder/layers/{i}" for i in range(4)), only[1]}
    for name in some.keys() & everything.keys():
        np.testing.assert_allclose(some[name], everything[name], atol=1e-5)
    images = predictor.stages(inputs, only="vision/output", batch_size=2)["vision/output"]
    np.testing.assert_allclose(images, everything["vision/output"], atol=1e-5)
    for wrong in ("decoder/layers", "vision/layers/9"):
        with pytest.raises(ValueError, match=f"only {NAMES} '{wrong}'"):
            predictor.stages(inputs, only=wrong)


def test_scores_are_those_of_the_weights(predictor):
    """softmax of the scores where the mask allows them; image and prompt attend to each other."""
    name = f"{LAYER}/attention"
    inputs = predictor.processor(PHOTO, "ocr", "4 3")
    stages = predictor.stages(inputs, only=[f"{name}/scores", f"{name}/weights"])
    scores, weights = (stages[f"{name}/{part}"][0] for part in ("scores", "weights"))
    prefix = int(inputs.prefix[0].sum())
    expected = jax.nn.softmax(scores[:, :prefix, :prefix])
    np.testing.assert_allclose(weights[:, :prefix, :prefix], expected, atol=1e-6)
    assert not weights[:, :prefix, prefix:].any()
