"""Prefix tuning: how a prefix is trained, saved, loaded and used, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import on_devices
from support.finetuning import losses, relative_difference

import paligemma_jax as pg
from convert import peft
from convert.adapter import Factors
from paligemma_jax.checkpoints.load import load_model
from paligemma_jax.checkpoints.save import save_model
from paligemma_jax.checkpoints.source import TINY, resolve
from paligemma_jax.inference.scoring import forward
from paligemma_jax.model.prefix import initial_prefix, prefix_of, with_prefix
from paligemma_jax.training.config import FinetuneConfig

PHOTO = TINY.parent / "digits.jpg"
ROWS = [{"image": str(PHOTO), "prefix": "ocr", "suffix": "3 2 3 4"}] * 2
OPTIONS = dict(data="", steps=3, batch_size=2, samples=0, learning_rate=0.03, train="prefix")


def run(output, **options):
    pg.finetune(FinetuneConfig(output=str(output), **OPTIONS | options), data=ROWS)
    return output


def score(source, **options) -> float:
    return float(pg.load(source, **options).score([PHOTO], ["ocr"], ["3 2 3 4"])[0])


def shape(model, count):
    decoder = model.config.decoder
    return count, decoder.num_hidden_layers, 2, decoder.num_key_value_heads, decoder.head_dim


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return run(tmp_path_factory.mktemp("prefix") / "run", soft_prompt=4)


@pytest.mark.thorough
def test_generation_and_scores_follow_the_logits():
    """Step by step as in one pass, for rows of different lengths, with every sampler."""
    predictor = pg.load("tiny")
    prefix = 5 * np.random.default_rng(0).normal(size=shape(predictor.model, 3))
    model = with_prefix(predictor.model, prefix.astype(np.float32))
    processor = replace(predictor.processor, soft_tokens=model.config.soft_tokens(3))
    prefixed = pg.Predictor(model, processor)
    prompts = ["ocr", "answer en how many digits?"]
    answers = prefixed.answers([PHOTO] * 2, prompts, 6)
    streamed = ["".join(prefixed.stream(PHOTO, prompt, 6)) for prompt in prompts]
    assert streamed == [answer.text for answer in answers]
    for prompt, answer in zip(prompts, answers, strict=True):
        inputs = processor(PHOTO, prompt)
        for token in answer.tokens:
            assert int(np.argmax(forward(model, inputs)[0, inputs.valid[0]][-1])) == token
            one = np.ones((1, 1), bool)
            inputs = replace(
                inputs,
                tokens=np.concatenate([inputs.tokens, [[token]]], 1).astype(np.int32),
                valid=np.concatenate([inputs.valid, one], 1),
                prefix=np.concatenate([inputs.prefix, ~one], 1),
                targets=np.concatenate([inputs.targets, ~one], 1),
            )
    assert prefixed.generate([PHOTO] * 2, prompts, 6, sampler=pg.Beam(1)) == streamed
    assert streamed != predictor.generate([PHOTO] * 2, prompts, 6)


def test_every_key_and_value_counts():
    model = load_model("tiny")
    processor = pg.load("tiny").processor
    soft = replace(processor, soft_tokens=model.config.soft_tokens(2))
    inputs = soft([PHOTO], ["ocr"], ["3 2"])

    def loss(prefix):
        return forward(with_prefix(model, prefix), inputs)[:, -1].max(axis=-1).sum()

    gradient = jax.grad(loss)(initial_prefix(model, 2))
    assert (jnp.abs(gradient).max(axis=(3, 4)) > 0).all()


@pytest.mark.thorough
def test_trained_it_is_all_that_is_saved(trained):
    """The first loss is that of the initial prefix; the answers change only by what was trained."""
    loaded, base = pg.load(trained), load_model("tiny")
    start = np.asarray(initial_prefix(base, 4))
    after = np.asarray(prefix_of(loaded.model))
    assert after.shape == start.shape == shape(base, 4) and (after != start).mean() > 0.9
    first = pg.Predictor(with_prefix(base, start), loaded.processor)
    before = first.score([PHOTO], ["ocr"], ["3 2 3 4"])[0]
    targets = loaded.processor(PHOTO, "ocr", "3 2 3 4").targets.sum()
    assert losses(trained)[0] == pytest.approx(-before / targets, rel=1e-5)
    assert score(trained) > before
    settings = json.loads((trained / "adapter" / peft.CONFIG).read_text())
    assert settings["peft_type"] == "PREFIX_TUNING" and not settings["prefix_projection"]
    assert score(trained / "adapter") == score(trained / "checkpoints/3")
    assert score(trained, layers="stack") == pytest.approx(score(trained), rel=1e-5)


def test_both_layer_forms_train_the_same_prefix(trained, tmp_path):
    other = prefix_of(pg.load(run(tmp_path / "run", soft_prompt=4, layers="list")).model)
    start = initial_prefix(load_model("tiny"), 4)
    assert relative_difference(other, prefix_of(pg.load(trained).model), start) < 5e-4


def test_a_stopped_run_resumes_bit_for_bit(trained, tmp_path):
    options = OPTIONS | dict(soft_prompt=4, save_every=1)
    config = FinetuneConfig(output=str(tmp_path / "part"), **options)

    def fail(event):
        if event.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pg.finetune(config, data=ROWS, callbacks=[fail])
    pg.finetune(replace(config, resume=True), data=ROWS)
    files = [folder / "adapter" / peft.WEIGHTS for folder in (trained, tmp_path / "part")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_it_is_trained_further(trained, tmp_path):
    targets = pg.load(trained).processor(PHOTO, "ocr", "3 2 3 4").targets.sum()
    further = run(tmp_path / "run", model=str(trained))
    assert losses(further)[0] == pytest.approx(-score(trained) / targets, rel=1e-5)
    assert score(further) == score(further / "checkpoints/3") > score(trained)


@pytest.mark.thorough
def test_eight_devices_compute_the_same():
    one, eight = (on_devices.call(n, "support.soft_prompts.scores", n, "prefix") for n in (1, 8))
    np.testing.assert_allclose(eight, one, rtol=2e-5)


def test_quantized_base(tmp_path):
    run(tmp_path / "run", soft_prompt=4, quantize="int8")
    predictor = pg.load(tmp_path / "run", quantize="int8,embedding=int8,cache=int8")
    assert predictor.answers(PHOTO, "ocr", 8)[0].tokens


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(soft_prompt=8), "--soft-prompt must be 4, as --model .*adapter has it, or be left"),
        (dict(train="prompt"), "has a prefix, .* with --train prefix only, got --train prompt"),
        (dict(model="tiny"), "--train prefix requires --soft-prompt, the number of its tokens"),
        (dict(soft_prompt=4, export="huggingface"), "--export huggingface must be left out"),
    ],
)
def test_options_that_do_not_fit(trained, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "run", **dict(model=str(trained / "adapter")) | options)
    assert not (tmp_path / "run").exists()


def test_what_a_prefix_cannot(trained, tmp_path):
    model, adapter = load_model("tiny"), trained / "adapter"
    with pytest.raises(ValueError, match="a prefix cannot be merged into the weights"):
        _ = resolve(adapter).merged
    with pytest.raises(ValueError, match="must have no prefix: save it as an adapter"):
        save_model(tmp_path / "model", pg.load(adapter).model)
    with pytest.raises(ValueError, match=r"a prefix must be float\[P, .*\], got \[4, 160\]"):
        with_prefix(model, np.ones((4, 160), np.float32))
    prefix = np.ones(shape(model, 4), np.float32)
    factors = {"decoder/layers/0/attention/q": Factors(prefix, prefix, 1.0)}
    with pytest.raises(ValueError, match="a prefix must be saved alone"):
        peft.save_adapter(tmp_path / "a", factors, model.config, "tiny", prefix=prefix)
    peft.save_adapter(tmp_path / "a", {}, model.config, "tiny", prefix=prefix[..., 1:])
    with pytest.raises(ValueError, match=r"prompt_embeddings must be a float of shape \[4, \d+\]"):
        pg.load(tmp_path / "a")
