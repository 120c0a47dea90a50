"""First contact: what is told where the accelerator, its build of jax or an extra is missing. (Gated checkpoints: tests/commands/test_errors.py.)"""

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
    "asked, remedy, arguments",
    [
        ("cuda", "[cuda12]", GENERATE),
        ("gpu", "[cuda12]", FINETUNE),
        ("cuda", "[cuda12]", ["bench"]),
        ("nonsense", "cpu, cuda or tpu", GENERATE),
    ],
)
def test_missing_accelerator(asked, remedy, arguments):
    command = [sys.executable, "-m", "paligemma_jax", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": asked})
    line = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and line.startswith(f"paligemma-jax: JAX_PLATFORMS is {asked}, but jax finds no such device: ") and remedy in line
    assert "Traceback" not in done.stderr


def test_accelerator_of_another_build(monkeypatch, tmp_path):
    """Who has said that the CPU is meant, in either way, is told nothing."""
    (tmp_path / "gpu").touch()
    monkeypatch.setattr(devices, "SIGNS", {"cuda": [tmp_path / "no gpu", tmp_path / "gpu"], "tpu": [tmp_path / "no tpu"]})
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    asked = jax.config.values["jax_platforms"]
    jax.config.update("jax_platforms", None)
    try:
        with pytest.warns(UserWarning, match=r"there is a CUDA device, but jax computes on the CPU: pip install 'paligemma-jax\[cuda12\]'") as told:
            devices.check_devices()
        assert len(told) == 1
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        devices.check_devices()
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
        jax.config.update("jax_platforms", "cpu")
        devices.check_devices()
    finally:
        jax.config.update("jax_platforms", asked)


def test_builds_that_do_not_fit():
    """What `import jax` says then (jax/_src/lib/__init__.py)."""
    error = RuntimeError("jaxlib version 0.9.0 is incompatible with jax version 0.10.2. In this case, jaxlib should be >= 0.10.0.\nmore")
    reason = _reason(error)
    assert reason and "pip install --upgrade" in reason and "jaxlib version 0.9.0" in reason and "\n" not in reason
    assert _reason(RuntimeError("something else")) is None
