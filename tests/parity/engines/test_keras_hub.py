"""The profile "keras" against keras-hub's own outputs.

The golden has the outputs of `paligemma_jax/parity/engines/run_keras_hub.py` in float32 for
`image_first_case(CONFIG, 6)`. `pytest -m engines` computes them again.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.engine_checkpoint import (
    CONFIG,
    golden_distances,
    identifiable,
    image_first_case,
    write_checkpoint,
)
from support.paths import GOLDEN

from paligemma_jax.model.numerics import NUMERICS
from paligemma_jax.parity.case import load_parity_case
from paligemma_jax.parity.engines.against import compare_with_engine, run_engine
from paligemma_jax.parity.engines.environment import parse_engine
from paligemma_jax.parity.engines.identify import identify

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
    return golden_distances(checkpoint, profile, image_first_case(CONFIG, NEW), golden)


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


@pytest.mark.thorough
def test_keras_hub_is_identified(checkpoint, golden, tmp_path):
    case = image_first_case(CONFIG, NEW)
    file = identifiable(tmp_path / "logits.npz", case, golden["labels/logits"])
    found = identify(str(checkpoint), file)
    assert found.found and found.profiles == ["keras"]


@pytest.mark.engines
def test_the_golden_is_what_keras_hub_computes(golden, tmp_path):
    case, engine = image_first_case(CONFIG, NEW), parse_engine("keras-hub==0.32.0")
    _, outputs = run_engine(case, engine, "float32", NEW, None, tmp_path)
    for name in ("labels/logits", "tokens", "prefill", "decode"):
        np.testing.assert_allclose(outputs[name], golden[name], atol=1e-4, err_msg=name)


@pytest.mark.engines
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("release", ["0.19.3", "0.32.0"])
def test_a_release_on_rows_of_different_lengths(release, dtype):
    case = load_parity_case("tiny")
    report = compare_with_engine(case, f"keras-hub=={release}", dtype, NEW)
    assert report.first_divergence is None and report.numerics == "keras"
    assert dtype == "bfloat16" or report.equal_tokens == 1
