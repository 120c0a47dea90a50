"""Parity without torch: the outputs of transformers 5.23 on two small random checkpoints, saved in
tests/golden by tests/support/make_golden.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache

import numpy as np
import pytest
from PIL import Image
from support.decoding import tokens_of
from support.golden import from_bytes, sample
from support.paths import GOLDEN, ROOT

import paligemma_jax as pg
from paligemma_jax.inference import scoring

KINDS = ["pg1", "pg2"]
TOLERANCE = {
    "vision": 2e-6,
    "projector": 2e-6,
    "decoder": 2e-5,
    "logits": 1.2e-5,
}  # relative to the largest value, as in tests/model/test_parity.py


@cache
def golden(kind: str):
    """(Predictor, transformers' outputs by name, Inputs of the forward pass)."""
    with np.load(GOLDEN / kind / "expected.npz") as file:
        expected = dict(file)
    inputs = pg.Inputs(
        expected["tokens"],
        from_bytes(expected["bytes"]),
        expected["valid"],
        expected["prefix"],
        expected["targets"],
    )
    return pg.load(GOLDEN / kind), expected, inputs


@pytest.mark.parametrize("kind", KINDS)
def test_stages(kind):
    predictor, expected, inputs = golden(kind)
    actual = predictor.stages(inputs, attention=True)
    assert {f"stages/{name}" for name in actual} == {
        name for name in expected if name.startswith("stages/")
    }
    for name, value in actual.items():
        target = expected[f"stages/{name}"]
        error = np.abs(sample(name, value, inputs.valid) - target).max() / np.abs(value).max()
        assert error < TOLERANCE[name.split("/")[0]], (name, error)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_loss(kind):
    predictor, expected, inputs = golden(kind)
    logits = predictor.logits(inputs)[0][inputs.valid]
    error = np.abs(logits[:, ::40] - expected["logits"])
    assert error.max() <= 2e-4 and error.mean() <= 2e-5
    loss = -scoring.score(predictor.model, inputs).sum() / inputs.targets.sum()
    assert abs(loss - expected["loss"]) < 2e-5


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens(kind):
    predictor, expected, _ = golden(kind)
    tokens, valid = expected["greedy/tokens"], expected["greedy/valid"]
    inputs = pg.Inputs(
        tokens, from_bytes(expected["greedy/bytes"]), valid, valid, np.zeros_like(valid)
    )
    target = expected["greedy/answer"]
    np.testing.assert_array_equal(tokens_of(predictor.model, inputs, target.shape[1]), target)


def test_processor():
    processor = golden("pg2")[0].processor
    for name, given in json.loads((GOLDEN / "processor.json").read_text("utf-8")).items():
        images = [[GOLDEN / "image.png"] * n for n in given["images"]]
        inputs = processor(images, given["prompts"], given["suffixes"], padding_side=given["side"])
        valid, targets = (
            np.array(given["attention_mask"]) == 1,
            np.array(given["token_type_ids"]) == 1,
        )
        np.testing.assert_array_equal(inputs.tokens, given["input_ids"], name)
        np.testing.assert_array_equal(
            [inputs.valid, inputs.targets, inputs.prefix], [valid, targets, valid & ~targets], name
        )
        np.testing.assert_array_equal(
            np.where(inputs.targets, inputs.tokens, -100), given["labels"], name
        )
        np.testing.assert_array_equal(
            inputs.images[-1], from_bytes(np.load(GOLDEN / "image.npy")), name
        )
        assert [processor.decode(row) for row in inputs.tokens] == given["decoded"]


def test_image_sources_are_equivalent():
    """A path, a PIL image and an array give the same answer."""
    predictor, image = golden("pg2")[0], GOLDEN / "image.png"
    answers = [
        predictor.generate(source, "caption en", 8)
        for source in (image, Image.open(image), np.asarray(Image.open(image)))
    ]
    assert answers[0] == answers[1] == answers[2] and answers[0][0]


WITHOUT = """
import sys
sys.modules["torch"] = sys.modules["transformers"] = None  # importing either is an ImportError
import pytest
tests = "pg2 and (logits or greedy) or processor"
sys.exit(pytest.main([sys.argv[1], "-q", "-p", "no:cacheprovider", "-k", tests]))
"""


def test_without_torch():
    """The core of this file passes in a process without torch and transformers, with programs that
    are optimized as those of users."""
    optimized = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0", "XLA_FLAGS": ""}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, __file__],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | optimized,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
