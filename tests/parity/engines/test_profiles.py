"""Every profile of a release of transformers against outputs of that release.

The goldens are outputs of the last release of each group on the checkpoint and inputs of
tests/support/engine_checkpoint.py, whose window is shorter than its rows. `pytest -m engines` runs
the releases themselves.
"""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.engine_checkpoint import golden_inputs, write_checkpoint
from support.paths import GOLDEN

from paligemma_jax.checkpoints.load import load_model
from paligemma_jax.checkpoints.source import resolve
from paligemma_jax.inference.scoring import forward
from paligemma_jax.parity.engines.releases import CALLS, RELEASES, visible_prefix

ENGINES = GOLDEN / "engines"
SAMPLE = ENGINES / "logits-5.3.0-float32.npz"
PROMPT = 24  # tokens
ATOL = 6e-5  # logits reach 25 and go through 6 layers


@pytest.fixture(scope="module")
def computed(tmp_path_factory):
    """The outputs of every profile."""
    source = resolve(str(write_checkpoint(tmp_path_factory.mktemp("engines") / "checkpoint")))
    inputs = golden_inputs(SAMPLE)
    with jax.default_matmul_precision("highest"):
        models = {name: load_model(source, "float32", name) for name in RELEASES}
        return {name: outputs(model, inputs, name) for name, model in models.items()}


def golden(profile):
    with np.load(ENGINES / f"{profile}.npz") as file:
        return dict(file)


def outputs(model, inputs, name):
    found = {}
    for call in CALLS:
        prefix = visible_prefix(model.config.profile, call, inputs.targets)
        found[call] = np.asarray(forward(model, replace(inputs, prefix=prefix)))[:, :, ::8]
    prompts = [getattr(inputs, field)[:, :PROMPT] for field in ("tokens", "valid", "prefix")]
    features = model.encode_images(jnp.asarray(inputs.images))
    tokens = golden(name)["tokens"]
    prefill = jax.jit(type(model).prefill, static_argnames="slots")
    first, cache = prefill(model, prompts[0], features, *prompts[1:], slots=PROMPT + 6)
    step, steps = jax.jit(type(model).decode_step), []
    for token in tokens.T[:-1]:
        logits, cache = step(model, jnp.asarray(token), cache)
        steps.append(np.asarray(logits)[:, ::4])
    return found | {"prefill": np.asarray(first), "decode": np.stack(steps, axis=1)}


def differences(found, expected):
    return {key: np.abs(value - expected[f"float32/{key}"]).max() for key, value in found.items()}


@pytest.mark.parametrize("profile", RELEASES)
def test_a_profile_computes_what_its_releases_compute(computed, profile):
    assert max(differences(computed[profile], golden(profile)).values()) < ATOL


@pytest.mark.parametrize("profile", RELEASES)
def test_no_other_profile_does(computed, profile):
    """5.4 stopped scaling image features, which shows in bfloat16 only."""
    expected = golden(profile)
    same = {
        name
        for name, found in computed.items()
        if np.array_equal(expected["tokens"], golden(name)["tokens"])
        and max(differences(found, expected).values()) < 0.1
    }
    features = {"transformers-5.0", "transformers-5.4"}
    assert same == (features if profile in features else {profile})
