"""Which program computed given logits: outputs of real releases, and files that are wrong."""

from __future__ import annotations

import re

import jax.numpy as jnp
import numpy as np
import pytest
from support.engine_checkpoint import write_checkpoint
from support.paths import GOLDEN

from paligemma_jax.parity.engines.identify import format_identified, identify, verdict

FLOAT32 = GOLDEN / "engines" / "logits-5.3.0-float32.npz"
BFLOAT16 = GOLDEN / "engines" / "logits-4.52.4-bfloat16.npz"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(write_checkpoint(tmp_path_factory.mktemp("identify") / "checkpoint"))


def changed(folder, **changes):
    with np.load(FLOAT32) as file:
        arrays = dict(file) | changes
    path = folder / "changed.npz"
    np.savez(path, **{name: value for name, value in arrays.items() if value is not None})
    return str(path)


@pytest.mark.thorough
def test_float32(checkpoint):
    found = identify(checkpoint, str(FLOAT32))
    assert found.profiles == ["transformers-5.0", "transformers-5.4", "transformers-5.9"]
    assert verdict(found) == (
        "these logits come from transformers 5.0 to 5.22 in float32, with token types and labels "
        "or with token types, without labels: no final softcap"
    )
    assert "differs by: a final softcap" in format_identified(found)


@pytest.mark.slow
def test_bfloat16(checkpoint):
    found = identify(checkpoint, str(BFLOAT16))
    assert found.found and found.dtype == "bfloat16"
    assert found.profiles == ["transformers-4.52"] and found.candidates[0].calls == ("labels",)


def test_bfloat16_as_jax_saves_it(checkpoint, tmp_path):
    with np.load(BFLOAT16) as file:
        logits = file["logits"].astype(jnp.bfloat16)
    assert identify(checkpoint, changed(tmp_path, logits=logits)).profiles == ["transformers-4.52"]


def test_names_of_transformers(checkpoint, tmp_path):
    with np.load(FLOAT32) as file:
        images, tokens, targets = file["images"], file["tokens"], file["targets"]
    file = changed(
        tmp_path,
        **dict(images=None, tokens=None, targets=None),
        pixel_values=np.moveaxis(images, 3, 1),
        input_ids=tokens.astype(np.int64),
        token_type_ids=targets.astype(np.int64),
    )
    assert identify(checkpoint, file).found


def test_other_inputs_are_not_identified(checkpoint, tmp_path):
    with np.load(FLOAT32) as file:
        found = identify(checkpoint, changed(tmp_path, images=-file["images"]))
    assert not found.found
    assert "check that checkpoint and inputs are the same" in verdict(found)


def wrong(logits):
    nan = logits.copy()
    nan[1, 2, 3] = np.nan
    return {
        "logits must be finite, got nan at [1, 2, 3]": dict(logits=nan),
        "logits must have 320 columns, got 99": dict(logits=logits[..., :99]),
        "logits must be [B, T, V] for tokens [B, T], got [1, 30, 320] and [2, 30]": dict(
            logits=logits[:1]
        ),
        "must have tokens or input_ids, got images, logits, targets, valid": dict(tokens=None),
        "images must be [2, 56, 56, 3] for 32 image tokens, got [2, 28, 28, 3]": dict(
            images=np.zeros((2, 28, 28, 3))
        ),
        "valid must be [2, 30], got [1]": dict(valid=np.ones(1)),
        "logits must be floats, got int32": dict(logits=np.ones((2, 30, 320), np.int32)),
        "tokens must be integers, got float64": dict(tokens=np.ones((2, 30))),
        "tokens must not be empty, got [0, 30]": dict(tokens=np.ones((0, 30), int)),
        "images must be finite, got inf at [0, 0, 0, 0]": dict(
            images=np.full((2, 56, 56, 3), np.inf, np.float32)
        ),
        "is not a complete .npz file": dict(logits=np.array([{}], object)),
    }


def test_wrong_files_are_refused_in_one_sentence(checkpoint, tmp_path):
    with np.load(FLOAT32) as file:
        cases = wrong(file["logits"])
    for message, changes in cases.items():
        with pytest.raises(ValueError, match=re.escape(message)):
            identify(checkpoint, changed(tmp_path, **changes))
    cut = tmp_path / "cut.npz"
    cut.write_bytes(FLOAT32.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"is not a complete \.npz file"):
        identify(checkpoint, str(cut))
    damaged = bytearray(FLOAT32.read_bytes())
    damaged[len(damaged) // 2 : len(damaged) // 2 + 99] = bytes(99)
    cut.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"is not a complete \.npz file"):
        identify(checkpoint, str(cut))
    with pytest.raises(ValueError, match="does not exist"):
        identify(checkpoint, str(tmp_path / "missing.npz"))
