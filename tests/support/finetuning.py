"""A small data set to fine-tune on, and readers of the output of a run."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from paligemma_jax.checkpoints.load import load_model
from paligemma_jax.model.tree import parameters
from paligemma_jax.training.config import FinetuneConfig


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A JSONL file of 12 noise images, 0.png to 11.png beside it; the answer is the number."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    rows = [{"image": f"{i}.png", "prefix": "ocr", "suffix": str(i)} for i in range(12)]
    for row in rows:
        pixels = rng.integers(0, 255, (56, 56, 3), np.uint8)
        Image.fromarray(pixels).save(folder / row["image"])
    file = folder / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def read_log(run, name="log.jsonl"):
    """The lines of a run's log."""
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def losses(run):
    return [line["loss"] for line in read_log(run)]


def weights(folder):
    """The parameters of a saved model as numpy arrays."""
    return {path: np.asarray(value) for path, value in parameters(load_model(folder)).items()}


def small_config(data, output, **options):
    """Return the config of a run with batches of 4."""
    return FinetuneConfig(str(data), str(output), **{"batch_size": 4} | options)


def assert_equal(first, second):
    """Assert that parameters are equal, bit for bit."""
    assert first.keys() == second.keys()
    for path, value in first.items():
        np.testing.assert_array_equal(value, second[path], err_msg=path)


def relative_difference(trained, reference, start):
    """How far parameters are from a reference, over how far training moved it.

    By norm: Adam turns the rounding of a gradient near 0 into a step of full size.
    """
    trained, reference = np.asarray(trained), np.asarray(reference)
    return np.linalg.norm(trained - reference) / np.linalg.norm(reference - np.asarray(start))
