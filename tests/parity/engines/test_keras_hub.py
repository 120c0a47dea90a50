"""The profile "keras" against keras-hub's own outputs.

They are those of `tests/support/run_keras_hub.py` for this checkpoint and these inputs, with every
fifth of the teacher-forced logits.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from support.engine_checkpoint import CONFIG, write_checkpoint
from support.paths import GOLDEN

from paligemma_jax.checkpoints.load import load_model
from paligemma_jax.checkpoints.synthetic import synthetic_inputs
from paligemma_jax.model.numerics import NUMERICS

KERAS = GOLDEN / "engines" / "keras.npz"
NEW = 6
# What differs if a field has another value. The other fields change only the rounding.
FIELDS = {
    "window": ("causal", ("labels/logits", "prefill", "decode")),
    "window_decode": (False, ("decode",)),
    "capped_prefill": (False, ("labels/logits", "prefill")),
    "capped_decode": (False, ("decode",)),
    "head_dim_scale": (False, ("labels/logits", "prefill", "decode")),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("keras") / "checkpoint")


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(KERAS) as file:
        return dict(file)


def distances(checkpoint: Path, profile: str, golden) -> dict[str, float]:
    """The largest difference of each output."""
    model = load_model(checkpoint, "float32", profile)
    inputs = synthetic_inputs(CONFIG, 2, 8 + NEW, 0)
    tokens, everywhere = jnp.asarray(inputs.tokens), jnp.asarray(inputs.valid)
    length = tokens.shape[1] - NEW
    prefix = jnp.broadcast_to(jnp.arange(tokens.shape[1]) < length, tokens.shape)
    images = jnp.asarray(inputs.images)
    outputs = {"labels/logits": model(tokens, images, everywhere, prefix)}
    prompt = everywhere[:, :length]
    features = model.encode_images(images)
    outputs["prefill"], cache = model.prefill(
        tokens[:, :length], features, prompt, prompt, length + NEW
    )
    steps = []
    for token in golden["tokens"].T[:-1]:
        logits, cache = model.decode_step(jnp.asarray(token), cache)
        steps.append(logits)
    outputs["decode"] = jnp.stack(steps, axis=1)
    rows = golden["prefill"].shape[-1]  # keras-hub's table ends before the image token
    outputs = {name: np.asarray(value)[..., :rows] for name, value in outputs.items()}
    outputs["labels/logits"] = outputs["labels/logits"][..., ::5]
    return {name: float(np.abs(value - golden[name]).max()) for name, value in outputs.items()}


@pytest.mark.thorough
def test_profile_is_keras_hub(checkpoint, golden):
    measured = distances(checkpoint, "keras", golden)
    assert max(measured.values()) < 1e-4, measured


@pytest.mark.parametrize("field", FIELDS)
def test_each_field_shows(checkpoint, golden, field, monkeypatch):
    """Another value of a field is not keras-hub."""
    value, outputs = FIELDS[field]
    other = replace(NUMERICS["keras"], **{field: value})
    monkeypatch.setitem(NUMERICS, "other", other)
    measured = distances(checkpoint, "other", golden)
    for name, distance in measured.items():
        assert (distance > 0.1) if name in outputs else (distance < 1e-4), measured


def test_window_looks_both_ways(checkpoint, golden, monkeypatch):
    """Image and prompt attend to no key a window ahead of them, unlike in transformers 4.47."""
    monkeypatch.setitem(NUMERICS, "other", replace(NUMERICS["keras"], window="all"))
    assert distances(checkpoint, "other", golden)["labels/logits"] > 0.1
