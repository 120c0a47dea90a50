"""The profile "big_vision" against big_vision's own outputs.

The golden has the outputs of `paligemma_jax/parity/engines/run_big_vision.py` in float32 for
`image_first_case(BIG_VISION_CONFIG, 6)`, with google-research/big_vision at commit 0127fb6.
`pytest -m engines` computes them again from the checkout that BIG_VISION names.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.engine_checkpoint import (
    BIG_VISION_CONFIG,
    CONFIG,
    golden_distances,
    identifiable,
    image_first_case,
    write_checkpoint,
)
from support.paths import GOLDEN

from paligemma_jax.model.numerics import NUMERICS
from paligemma_jax.parity.case import load_parity_case, random_case
from paligemma_jax.parity.engines.against import compare_with_engine, run_engine
from paligemma_jax.parity.engines.environment import parse_engine
from paligemma_jax.parity.engines.identify import identify
from paligemma_jax.parity.engines.inputs import image_first

NEW = 6
CHECKOUT = os.environ.get("BIG_VISION")
needs_checkout = pytest.mark.skipif(not CHECKOUT, reason="set BIG_VISION to a checkout of it")
# What differs if a field has another value. The other fields change only the rounding.
FIELDS = {
    "window": ("causal", {"labels/logits"}),
    "window_decode": (True, {"decode"}),
    "capped_prefill": (True, {"labels/logits", "prefill"}),
    "capped_decode": (False, {"decode"}),
    "head_dim_scale": (True, {"labels/logits", "prefill", "decode"}),
}

# Fields of the second Gemma's config.
SECOND = ("sliding_window", "attn_logit_softcapping", "final_logit_softcapping")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("big_vision") / "checkpoint"
    return write_checkpoint(folder, BIG_VISION_CONFIG)


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "engines" / "big_vision.npz") as file:
        return dict(file)


def distances(checkpoint: Path, profile: str, golden) -> dict[str, float]:
    return golden_distances(checkpoint, profile, image_first_case(BIG_VISION_CONFIG, NEW), golden)


def test_profile_is_big_vision(checkpoint, golden):
    measured = distances(checkpoint, "big_vision", golden)
    assert max(measured.values()) < 1e-4, measured


@pytest.mark.parametrize("field", FIELDS)
def test_each_field_shows(checkpoint, golden, field, monkeypatch):
    """Another value of a field is not big_vision."""
    value, outputs = FIELDS[field]
    other = replace(NUMERICS["big_vision"], **{field: value})
    monkeypatch.setitem(NUMERICS, "other", other)
    measured = distances(checkpoint, "other", golden)
    assert {name for name, distance in measured.items() if distance > 0.1} == outputs, measured


@pytest.mark.thorough
def test_big_vision_is_identified(checkpoint, golden, tmp_path):
    """Releases that compute the same, rounding apart, are named with it."""
    case = image_first_case(BIG_VISION_CONFIG, NEW)
    file = identifiable(tmp_path / "logits.npz", case, golden["labels/logits"])
    found = identify(str(checkpoint), file)
    assert found.found
    assert found.profiles == ["transformers-4.53", "transformers-4.56", "big_vision"]


def test_models_and_inputs_that_it_cannot_compute_are_refused():
    with pytest.raises(
        ValueError, match=r"query_pre_attn_scalar must be one of \(16, 14\), got 12"
    ):
        image_first(image_first_case(CONFIG, NEW), "big_vision")
    case = image_first_case(BIG_VISION_CONFIG, NEW)
    tokens = np.roll(case.inputs.tokens, 1, axis=1)
    with pytest.raises(ValueError, match="takes one image for each prompt, before its text"):
        image_first(replace(case, inputs=replace(case.inputs, tokens=tokens)), "big_vision")


def test_pads_are_moved_to_the_end():
    case = image_first_case(BIG_VISION_CONFIG, NEW)
    valid = np.ones_like(case.inputs.valid)
    valid[1, :3] = False  # the row starts with three pads, in place of its last tokens
    names = ("tokens", "targets", "prefix")
    rows = {name: np.array(getattr(case.inputs, name)) for name in names}
    for array in rows.values():
        array[1, 3:] = array[1, :-3].copy()
    left = replace(case.inputs, valid=valid, **rows)
    moved = image_first(replace(case, inputs=left), "keras-hub").inputs
    assert moved.valid[1, 0] and not moved.valid[1, -3:].any() and moved.valid[:, :-3].all()
    for name, array in rows.items():
        assert (array[valid] == getattr(moved, name)[moved.valid]).all()


def test_a_checkout_is_needed(tmp_path):
    with pytest.raises(ValueError, match=r"must be a checkout of big_vision with .*git clone http"):
        parse_engine(f"big_vision={tmp_path}")


@pytest.mark.engines
@needs_checkout
def test_the_golden_is_what_big_vision_computes(golden, tmp_path):
    case, engine = image_first_case(BIG_VISION_CONFIG, NEW), parse_engine(f"big_vision={CHECKOUT}")
    _, outputs = run_engine(case, engine, "float32", NEW, None, tmp_path)
    for name in ("labels/logits", "tokens", "prefill", "decode"):
        np.testing.assert_allclose(outputs[name], golden[name], atol=1e-4, err_msg=name)


@pytest.mark.engines
@needs_checkout
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_of_different_lengths(dtype):
    case = load_parity_case("tiny")
    report = compare_with_engine(case, f"big_vision={CHECKOUT}", dtype, NEW)
    assert report.first_divergence is None and report.equal_tokens == 1
    stages = [row.stage for row in report.rows]
    assert {"labels/vision/layers/3", "labels/projector", "labels/decoder/norm"} <= set(stages)


@pytest.mark.engines
@needs_checkout
def test_paligemma_1():
    gemma = replace(CONFIG.decoder, model_type="gemma", query_pre_attn_scalar=16)
    gemma = replace(gemma, **dict.fromkeys(SECOND))
    case = random_case(replace(CONFIG, decoder=gemma), 8, NEW)
    report = compare_with_engine(case, f"big_vision={CHECKOUT}", "float32", NEW)
    assert report.first_divergence is None and report.equal_tokens == 1
