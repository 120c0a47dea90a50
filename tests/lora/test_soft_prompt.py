"""Soft prompts: what they compute, how they are trained, saved and loaded, and what is refused."""

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
from paligemma_jax.checkpoints.load import load_model
from paligemma_jax.checkpoints.save import save_model
from paligemma_jax.checkpoints.source import TINY, resolve
from paligemma_jax.inference.scoring import forward
from paligemma_jax.model.soft_prompt import initial_soft_prompt, with_soft_prompt
from paligemma_jax.training.config import FinetuneConfig

PHOTO = TINY.parent / "digits.jpg"
ROWS = [{"image": str(PHOTO), "prefix": "ocr", "suffix": "3 2 3 4"}] * 2
OPTIONS = dict(data="", steps=3, batch_size=2, samples=0, learning_rate=0.1)


def run(output, **options) -> FinetuneConfig:
    config = FinetuneConfig(output=str(output), **OPTIONS | options)
    pg.finetune(config, data=ROWS)
    return config


@pytest.mark.parametrize("layers", ["list", "stack"])
def test_embeddings_of_tokens_are_these_tokens(layers):
    predictor, ids = pg.load("tiny", layers=layers), [5, 77, 301]
    vectors = predictor.model.decoder.embedder.encode(jnp.array([ids]), jnp.float32)[0]
    model = with_soft_prompt(predictor.model, vectors)
    soft = model.config.soft_tokens(3)
    prompted = pg.Predictor(model, replace(predictor.processor, soft_tokens=soft))
    inputs = prompted.processor([PHOTO] * 2, ["ocr", "answer en how many digits?"], ["4 3", "4"])
    assert inputs.prefix[inputs.tokens == soft[0]].all()
    tokens = np.where(inputs.tokens >= soft[0], 0, inputs.tokens)
    for number, i in zip(soft, ids, strict=True):
        tokens[inputs.tokens == number] = i
    expected = forward(predictor.model, replace(inputs, tokens=tokens))
    np.testing.assert_array_equal(forward(model, inputs), expected)
    assert prompted.score(inputs).shape == (2,)


def test_vectors_of_each_row():
    """They are differentiable, generate as tokens do, and cannot be paired with the wrong row."""
    predictor, ids = pg.load("tiny"), jnp.array([[5, 77], [301, 8], [9, 9]])
    vectors = predictor.model.decoder.embedder.encode(ids, jnp.float32)
    model = with_soft_prompt(predictor.model, vectors)
    soft = model.config.soft_tokens(2)
    prompted = pg.Predictor(model, replace(predictor.processor, soft_tokens=soft))
    prompts = ["answer en how many digits?", "ocr", "caption en"]
    inputs = prompted.processor([PHOTO] * 3, prompts)
    tokens = inputs.tokens.copy()
    tokens[inputs.tokens >= soft[0]] = ids.ravel()
    as_text = replace(inputs, tokens=tokens)
    np.testing.assert_array_equal(forward(model, inputs), forward(predictor.model, as_text))
    for sampler in (pg.Greedy(), pg.Beam(2)):
        texts = predictor.generate(as_text, sampler=sampler)
        assert prompted.generate(inputs, sampler=sampler) == texts

    def loss(vectors):
        return forward(with_soft_prompt(model, vectors), inputs)[:, -1].max(axis=-1).sum()

    assert (np.abs(jax.grad(loss)(vectors)).max(axis=2) > 0).all()
    with pytest.raises(ValueError, match="vectors for each row require Inputs"):
        prompted.generate([PHOTO] * 3, prompts)
    with pytest.raises(ValueError, match="vectors of 3 rows need inputs of 3 rows, got 2"):
        forward(model, jax.tree.map(lambda x: x[:2], inputs))


def test_trained_alone_it_is_all_that_is_saved(tmp_path):
    """The first loss is that of the initial prompt; the answers change only by what was trained."""
    run(tmp_path / "run", train="prompt", soft_prompt=4)
    loaded = pg.load(tmp_path / "run")
    base = load_model("tiny")
    start = np.asarray(initial_soft_prompt(base, 4))
    vectors = np.asarray(loaded.model.soft_prompt[...])
    assert vectors.shape == start.shape and (vectors != start).all()
    assert losses(tmp_path / "run")[0] > losses(tmp_path / "run")[-1]
    first = pg.Predictor(with_soft_prompt(base, start), loaded.processor)
    scores = first.score([PHOTO] * 2, ["ocr"] * 2, ["3 2 3 4"] * 2)
    targets = first.processor(PHOTO, "ocr", "3 2 3 4").targets.sum()
    assert losses(tmp_path / "run")[0] == pytest.approx(-scores[0] / targets, rel=1e-5)
    after = loaded.score([PHOTO], ["ocr"], ["3 2 3 4"])
    assert after[0] > scores[0]
    jax.tree.map(np.testing.assert_array_equal, base.decoder, loaded.model.decoder)


@pytest.mark.thorough
def test_beside_lora_both_are_saved(tmp_path):
    """The adapter, and the last training state on top of the base, are the same model."""
    run(tmp_path / "run", train="lora", soft_prompt=4, lora_rank=2, layers="list")
    adapter = peft.read(tmp_path / "run" / "adapter", load_model("tiny").config)
    assert adapter.soft_tokens == 4 and len(adapter.factors) == 28
    scores = [
        pg.load(source).score([PHOTO], ["ocr"], ["3 2 3 4"])
        for source in (tmp_path / "run" / "adapter", tmp_path / "run" / "checkpoints" / "3")
    ]
    np.testing.assert_array_equal(scores[0], scores[1])


def test_both_layer_forms_train_the_same_prompt(tmp_path):
    for layers in ("list", "stack"):
        run(tmp_path / layers, train="prompt", soft_prompt=4, layers=layers)
    prompts = [pg.load(tmp_path / layers).model.soft_prompt[...] for layers in ("list", "stack")]
    start = initial_soft_prompt(load_model("tiny"), 4)
    assert relative_difference(*prompts, start) < 5e-4


def test_a_stopped_run_resumes_bit_for_bit(tmp_path):
    options = dict(train="prompt", soft_prompt=4, save_every=1)
    run(tmp_path / "full", **options)
    config = FinetuneConfig(output=str(tmp_path / "part"), **OPTIONS | options)

    def fail(event):
        if event.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pg.finetune(config, data=ROWS, callbacks=[fail])
    pg.finetune(replace(config, resume=True), data=ROWS)
    files = [tmp_path / name / "adapter" / peft.WEIGHTS for name in ("full", "part")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.thorough
def test_eight_devices_compute_the_same():
    one, eight = (on_devices.call(n, "support.soft_prompts.scores", n) for n in (1, 8))
    np.testing.assert_allclose(eight, one, rtol=2e-5)


def test_quantized_base(tmp_path):
    run(tmp_path / "run", train="prompt", soft_prompt=4, quantize="int8")
    predictor = pg.load(tmp_path / "run", quantize="int8,embedding=int8")
    assert predictor.answers(PHOTO, "ocr", 8)[0].tokens


@pytest.mark.parametrize(
    "options, message",
    [
        (
            dict(train="all", soft_prompt=4),
            "--soft-prompt requires --train prompt, prefix or lora, got",
        ),
        (dict(train="prompt", soft_prompt=-1), "--soft-prompt must be at least 0, got -1"),
        (dict(train="prompt", soft_prompt=4, export="huggingface"), "--export huggingface must be"),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        FinetuneConfig("rows.jsonl", "run", **options)


def test_a_prompt_longer_than_the_context(tmp_path):
    with pytest.raises(ValueError, match="tokens, 64 of them for images, but the context is 8192"):
        run(tmp_path / "run", train="prompt", soft_prompt=9000)


@pytest.mark.parametrize(
    "vectors, settings, message",
    [
        (np.zeros((4, 8), np.float32), {}, r"float of shape \[4, 160\], got F32 \[4, 8\]"),
        (np.zeros((4, 160), np.float32), {"num_virtual_tokens": 5}, r"shape \[5, 160\], got F32"),
        (np.zeros((4, 160), np.float32), {"num_virtual_tokens": 0}, "num_virtual_tokens"),
    ],
)
def test_adapters_that_do_not_fit(tmp_path, vectors, settings, message):
    adapter = tmp_path / "adapter"
    peft.save_adapter(adapter, {}, load_model("tiny").config, "tiny", soft_prompt=vectors)
    file = adapter / peft.CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    with pytest.raises(ValueError, match=message):
        pg.load(adapter)


def test_what_a_soft_prompt_cannot(tmp_path):
    config, vectors = load_model("tiny").config, np.ones((4, 160), np.float32)
    adapter = tmp_path / "adapter"
    peft.save_adapter(adapter, {}, config, "tiny", soft_prompt=vectors)
    with pytest.raises(ValueError, match="a soft prompt cannot be merged into the weights"):
        _ = resolve(adapter).merged
    with pytest.raises(ValueError, match="must have no soft prompt: save it as an adapter"):
        save_model(tmp_path / "model", pg.load(adapter).model)
    with pytest.raises(ValueError, match=r"must be float\[N, 160\] or \[B, N, 160\], got \[160\]"):
        with_soft_prompt(load_model("tiny"), vectors[0])
