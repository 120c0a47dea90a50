"""Models with modules of the user's own are saved and loaded, and nothing else is."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.paths import DIGITS

import paligemma_jax as pg
from paligemma_jax.checkpoints.changed import load_changed, own_classes, save_changed
from paligemma_jax.model.layers import Linear
from paligemma_jax.model.tree import replace_modules


class Regressor(nnx.Module):
    """One number from the last valid token's hidden state."""

    def __init__(self, vlm, outputs: int = 1):
        self.vlm = vlm
        width = vlm.config.decoder.hidden_size
        self.head = Linear("ED", (outputs, width), bias=True, rngs=nnx.Rngs(0))

    def __call__(self, inputs):
        x = self.vlm.hidden(inputs.tokens, inputs.images, inputs.valid, inputs.prefix)
        last = jnp.argmax(jnp.cumsum(inputs.valid, axis=1), axis=1)
        return self.head(x[jnp.arange(len(x)), last])


class Gate(nnx.Module):
    def __init__(self, base):
        self.base, self.gate = base, nnx.Param(jnp.ones(()))

    def __call__(self, x):
        return self.gate[...] * self.base(x)


def gated(model):
    def wrap(path, module):
        return Gate(module) if path == "decoder/layers/1/mlp" else None

    return Regressor(replace_modules(model, wrap))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(predictor, changed model, its directory)."""
    predictor = pg.load("tiny")
    model = gated(predictor.model)
    model.head.kernel = nnx.Param(model.head.kernel[...] + 1)
    directory = tmp_path_factory.mktemp("changed") / "model"
    save_changed(directory, model, predictor.config, like="tiny")
    return predictor, model, directory


def test_a_changed_model_computes_the_same_after_loading(saved):
    predictor, model, directory = saved
    inputs = jax.tree.map(jnp.asarray, predictor.processor(str(DIGITS), "ocr"))
    loaded = load_changed(directory, gated)
    np.testing.assert_array_equal(loaded(inputs), model(inputs))
    described = json.loads((directory / "changed.json").read_text())["classes"]
    assert {path: name.rpartition(".")[2] for path, name in described.items()} == {
        "": "Regressor",
        "vlm/decoder/layers/1/mlp": "Gate",
    }
    assert own_classes(predictor.model) == {}
    assert (directory / "huggingface" / "tokenizer.model").exists()


def test_stacked_layers_are_loaded_as_a_stack(tmp_path):
    predictor = pg.load("tiny", layers="stack")
    model = Regressor(predictor.model)
    save_changed(tmp_path / "model", model, predictor.config)
    inputs = jax.tree.map(jnp.asarray, predictor.processor(str(DIGITS), "ocr"))
    loaded = load_changed(tmp_path / "model", Regressor)
    np.testing.assert_array_equal(loaded(inputs), model(inputs))


REFUSED = {
    "the model": (lambda model: model, "for the model itself, but build makes a class of this"),
    "a part": (Regressor, "for vlm/decoder/layers/1/mlp, but build makes a class of this project"),
    "a shape": (
        lambda model: Regressor(gated(model).vlm, 3),
        "head/bias must be [3], got [1]; head/kernel must be [3, 160], got [1, 160]",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_another_model_is_refused_in_one_sentence(saved, name):
    build, message = REFUSED[name]
    with pytest.raises(ValueError) as error:
        load_changed(saved[2], build)
    assert "\n" not in str(error.value)
    for part in message.split("; "):
        assert part in str(error.value)


def test_a_damaged_file_is_refused_in_one_sentence(saved, tmp_path):
    predictor, model, _ = saved
    directory = tmp_path / "model"
    with pytest.raises(ValueError, match=r"has no changed\.json"):
        load_changed(tmp_path, gated)
    save_changed(directory, model, predictor.config)
    with pytest.raises(ValueError, match="exists; choose another name"):
        save_changed(directory, model, predictor.config)
    (directory / "model.safetensors").write_bytes(b"123")
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        load_changed(directory, gated)
