"""Hints for a missing accelerator, build of jax or extra.

For gated checkpoints see tests/commands/test_errors.py.
"""

from __future__ import annotations

import os
import subprocess
import sys

import jax
import pytest
from support.paths import ROOT

from paligemma_jax.errors import _reason
from paligemma_jax.sharding import devices

IMAGE = ROOT / "tests" / "golden" / "image.png"
GENERATE = ["generate", "--image", str(IMAGE), "--prompt", "ocr"]
FINETUNE = ["finetune", "--data", "none.jsonl", "--output", "none"]


@pytest.mark.parametrize(
    "platform, hint, arguments",
    [
        ("cuda", "[cuda12]", GENERATE),
        ("gpu", "[cuda12]", FINETUNE),
        ("cuda", "[cuda12]", ["bench"]),
        ("nonsense", "cpu, cuda or tpu", GENERATE),
    ],
)
@pytest.mark.thorough
def test_missing_accelerator(platform, hint, arguments):
    process = subprocess.run(
        [sys.executable, "-m", "paligemma_jax", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": platform},
    )
    line = process.stderr.splitlines()[-1]
    prefix = f"paligemma-jax: JAX_PLATFORMS is {platform}, but JAX finds no such device: "
    assert process.returncode == 2 and line.startswith(prefix) and hint in line
    assert "Traceback" not in process.stderr


def test_accelerator_that_jax_does_not_use(monkeypatch, tmp_path):
    """There is no warning if the user chose the CPU, in either way."""
    (tmp_path / "gpu").touch()
    files = {"cuda": [tmp_path / "no gpu", tmp_path / "gpu"], "tpu": [tmp_path / "no tpu"]}
    monkeypatch.setattr(devices, "DEVICE_FILES", files)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    platforms = jax.config.values["jax_platforms"]
    jax.config.update("jax_platforms", None)
    message = (
        "this machine has a CUDA device, but JAX runs on the CPU: "
        r"pip install 'paligemma-jax\[cuda12\]'"
    )
    try:
        with pytest.warns(UserWarning, match=message) as warned:
            devices.check_devices()
        assert len(warned) == 1
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        devices.check_devices()
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
        jax.config.update("jax_platforms", "cpu")
        devices.check_devices()
    finally:
        jax.config.update("jax_platforms", platforms)


def test_incompatible_jaxlib():
    """The error comes from `import jax` (jax/_src/lib/__init__.py)."""
    error = RuntimeError(
        "jaxlib version 0.9.0 is incompatible with jax version 0.10.2. In this case, jaxlib should "
        "be >= 0.10.0.\nmore"
    )
    reason = _reason(error)
    assert reason and "pip install --upgrade" in reason and "jaxlib version 0.9.0" in reason
    assert "\n" not in reason
    assert _reason(RuntimeError("something else")) is None
