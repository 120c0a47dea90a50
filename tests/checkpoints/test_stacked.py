"""Models whose layers differ, loaded with `layers="stack"`."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from support.logits import logits
from support.tiny_adapters import random_factors, save_adapters

import paligemma_jax as pg
from convert import peft
from paligemma_jax.lora import LoRALinear, lora_factors
from paligemma_jax.model.stack import stack_model, unstack_model
from paligemma_jax.model.tree import modules, replace_modules

QUANTIZE = "int8,vision=int8"


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """Adapters of all layers or some, with ranks of their own, one with the magnitudes of DoRA."""
    model, directory = pg.load("tiny").model, tmp_path_factory.mktemp("adapters")
    paths = save_adapters(model, directory)
    factors = random_factors(model, "mlp")
    for path, f in factors.items():
        factors[path] = replace(f, magnitude=np.linspace(0.5, 1.5, len(f.b), dtype="f"))
    peft.save_adapter(directory / "dora", factors, model.config, "tiny")
    return paths | {"dora": directory / "dora"}


@pytest.mark.parametrize("name", ["qv", "mlp", "dora"])
@pytest.mark.thorough
def test_adapters_of_some_layers_beside_quantized_weights(directories, name):
    """The logits are those of the adapter as it is, here by the same program: a list of layers."""
    listed = pg.load(directories[name], quantize=QUANTIZE).model
    expected, base = logits(listed), logits(pg.load("tiny", quantize=QUANTIZE).model)
    stacked = pg.load(directories[name], quantize=QUANTIZE, layers="stack").model
    assert all("/layers/0" not in path for path in modules(stacked, LoRALinear))
    largest = np.abs(expected).max()
    np.testing.assert_allclose(logits(unstack_model(stacked)), expected, atol=1e-6 * largest)
    assert np.abs(expected - base).max() > 0.01 * largest


@pytest.mark.parametrize("name", ["mlp", "vision"])
def test_the_stacked_factors_are_those_of_the_adapter_with_zeros(directories, name):
    given = lora_factors(pg.load(directories[name], quantize=QUANTIZE).model)
    stacked = lora_factors(pg.load(directories[name], quantize=QUANTIZE, layers="stack").model)
    for path, f in stacked.items():
        update = f.scale * np.tensordot(f.b, f.a, axes=1)
        own = given.get(path)
        expected = own.scale * np.tensordot(own.b, own.a, axes=1) if own else 0 * update
        np.testing.assert_allclose(update, expected, atol=1e-6, err_msg=path)
    assert given.keys() < stacked.keys()


def test_layers_that_differ_are_refused_in_one_sentence():
    model = pg.load("tiny").model
    factors = random_factors(model, "qv")

    def adapt(path, module):
        if path != "decoder/layers/2/attention/q":
            return None
        return LoRALinear(module, factors[path].a, factors[path].b, 1.0)

    with pytest.raises(ValueError, match=r"^layers to stack must be alike, but layer 2 of decoder"):
        stack_model(replace_modules(model, adapt))
