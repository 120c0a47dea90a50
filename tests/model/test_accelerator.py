"""A GPU or TPU computes the same numbers as the CPU.

Run by hand: `JAX_PLATFORMS=cuda,cpu pytest -m accelerator` (or tpu,cpu).
"""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paligemma_jax as pg
from paligemma_jax.checkpoints.load import load_model
from paligemma_jax.checkpoints.source import TINY
from paligemma_jax.data.rows import Example
from paligemma_jax.grammars.grammar import Boxes
from paligemma_jax.model.codes import decode, encode, multiply, scales
from paligemma_jax.model.edits import Scale
from paligemma_jax.model.precision import WeightFormat
from paligemma_jax.model.stack import stack_model
from paligemma_jax.processing.locations import parse_detections
from paligemma_jax.reinforcement.grpo import GRPO
from paligemma_jax.training.batches import Batch, max_targets
from paligemma_jax.training.config import FinetuneConfig
from paligemma_jax.training.prepare import prepare_model
from paligemma_jax.training.trainer import Trainer

pytestmark = [
    pytest.mark.accelerator,
    pytest.mark.skipif(jax.default_backend() == "cpu", reason="no GPU or TPU is present"),
]
PHOTO = TINY.parent / "digits.jpg"
ANSWERS = {
    "caption en": "four digits: 4, 3, 2 and 3",
    "ocr": "4 3 2 3",
    "answer en how many digits?": "4",
}


def both(function):
    """The results of `function` on the accelerator and on the CPU."""
    on_accelerator = function()
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        return on_accelerator, function()


@pytest.mark.parametrize("numerics", ["transformers", "big_vision"])
def test_logits(numerics):
    actual, expected = both(
        lambda: pg.load("tiny", dtype="float32", numerics=numerics).logits(PHOTO, "ocr", "4 3 2 3")[
            0
        ]
    )
    error = np.abs(actual - expected)
    assert expected.std() > 2 and error.max() <= 2e-4 and error.mean() <= 2e-5


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dtype": "bfloat16"},
        {"quantize": "int8"},
        {"quantize": "nf4,embedding=int8,vision=int8,cache=int8"},
    ],
    ids=str,
)
def test_answers(options):
    """The default is the checkpoint's dtype, bfloat16."""
    assert pg.load("tiny", **options).generate([PHOTO] * 3, list(ANSWERS)) == list(ANSWERS.values())


def test_samples():
    def draw() -> list[str]:
        sampler = pg.Sample(temperature=3.0, top_k=3)
        predictor = pg.load("tiny", dtype="float32")
        return predictor.generate([PHOTO] * 8, ["ocr"] * 8, sampler=sampler, seeds=range(8))

    actual, expected = both(draw)
    assert actual == expected and len({*actual}) > 1


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("kind", ["int8", "int4", "nf4", "nf4-64-double"])
def test_products_with_codes(kind, rows):
    rng, format = np.random.default_rng(0), WeightFormat.parse(kind)
    parts = encode(format, jnp.asarray(rng.standard_normal((48, 128), np.float32)), 1)
    x, dense = (
        rng.standard_normal((rows, 128), np.float32),
        np.asarray(decode(format, parts, (48, 128))),
    )
    np.testing.assert_allclose(
        multiply(format, jnp.asarray(x), parts["codes"], scales(parts)), x @ dense.T, atol=2e-5
    )


@pytest.mark.parametrize("train, quantize", [("all", None), ("lora", "nf4")])
def test_training_step(train, quantize):
    """SGD at a learning rate of 1: the change is the gradient. LoRA's B starts at 0, so only B has
    one."""

    def gradients() -> dict[str, np.ndarray]:
        config = FinetuneConfig(
            "",
            "",
            train=train,
            quantize=quantize,
            optimizer="sgd",
            beta1=0,
            learning_rate=1.0,
            warmup=0,
            clip=0,
            batch_size=2,
        )
        inputs = pg.load("tiny").processor(
            [PHOTO] * 2, ["ocr", "caption en"], ["4 3 2 3", "four digits"]
        )
        data = Batch(inputs, np.ones(2, np.float32))
        trainer = Trainer(prepare_model(load_model(TINY, "float32"), config), config, 1)
        state = trainer.start()
        before = {path: np.array(value) for path, value in state.trainable.items()}
        state, _ = trainer.step(state, trainer.frozen, data, max_targets=max_targets(data))
        return {path: before[path] - np.asarray(value) for path, value in state.trainable.items()}

    actual, expected = both(gradients)
    for path, value in expected.items():
        assert np.linalg.norm(actual[path] - value) <= 1e-4 * max(np.linalg.norm(value), 1e-3), path


def test_list_and_stack():
    model = load_model(TINY, "float32")
    inputs = pg.load("tiny").processor(PHOTO, "ocr", "4 3 2 3")
    run = jax.jit(lambda model: model(inputs.tokens, inputs.images, inputs.valid, inputs.prefix))
    expected = run(model)
    np.testing.assert_allclose(run(stack_model(model)), expected, atol=2e-4)


def test_edits_and_stages():
    edit = {"decoder/layers/1/mlp/output": Scale(0.5)}
    names = ["decoder/layers/2", "decoder/layers/0/attention/scores"]

    def run() -> dict[str, np.ndarray]:
        predictor = pg.load("tiny", dtype="float32")
        return predictor.stages(PHOTO, "ocr", "4 3 2 3", only=names, edit=edit)

    actual, expected = both(run)
    for name in names:
        scale = np.abs(expected[name]).max()
        np.testing.assert_allclose(actual[name], expected[name], atol=2e-5 * scale)


def test_answers_of_a_grammar():
    """The automaton runs in the compiled loop: every answer is boxes, and the same ones."""

    def draw() -> list[str]:
        predictor = pg.load("tiny", dtype="float32")
        options = dict(sampler=pg.Sample(temperature=2.0), allowed=Boxes(["4", "3"]))
        return predictor.generate([PHOTO] * 8, ["detect 4"] * 8, seeds=range(8), **options)

    actual, expected = both(draw)
    assert actual == expected and len({*actual}) > 1
    assert not any(parse_detections(answer, (640, 480)).skipped for answer in actual)


def test_step_of_grpo(tmp_path):
    """Samples, rewards and the update: the log of two steps. Masks differ between samples."""
    rows = [{"image": str(PHOTO), "prefix": "segment 4", "suffix": ""}] * 4

    def ones(answer: str, example: Example) -> float:
        return answer.count("1")

    def train(name: str) -> list[dict]:
        output = tmp_path / name
        options = dict(output=str(output), steps=2, batch_size=4, samples=0, dtype="float32")
        config = FinetuneConfig("", learning_rate=1e-4, **options)
        pg.finetune(config, data=rows, objective=GRPO(ones, group=4, max_new_tokens=12))
        return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]

    names = iter(("accelerator", "cpu"))
    actual, expected = both(lambda: train(next(names)))
    for a, b in zip(actual, expected, strict=True):
        assert a.get("reward") == b.get("reward")
        assert b.get("gradient_norm", 1) > 0
        assert a.get("gradient_norm") == pytest.approx(b.get("gradient_norm"), rel=1e-3)
