"""."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from paligemma_jax.checkpoints.load import load_model
from paligemma_jax.model.tree import parameters


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """12 images of noise, each with its number to say, as JSONL."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    rows = [{"image": f"{i}.png", "prefix": "ocr", "suffix": str(i)} for i in range(12)]
    for row in rows:
        Image.fromarray(rng.integers(0, 255, (56, 56, 3), np.uint8)).save(folder / row["image"])
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "rows.jsonl"


def weights(folder):
    return {path: np.asarray(value) for path, value in parameters(load_model(folder)).items()}


def losses(run):
    return [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]
