"""`--deterministic`: the flags that it gives XLA, and where it changes nothing."""

from __future__ import annotations

import os
import subprocess
import sys

import jax
import pytest
from support.paths import GOLDEN

from paligemma_jax.sharding import deterministic
from paligemma_jax.sharding.deterministic import FLAGS, require_deterministic_programs


@pytest.fixture
def before_jax(monkeypatch):
    """As in a process that has not started JAX, where it may find a GPU."""
    monkeypatch.setattr(deterministic, "backends_are_initialized", lambda: False)
    monkeypatch.setattr(deterministic, "_may_use_gpu", lambda: True)
    monkeypatch.setenv("XLA_FLAGS", "")


def test_flags_of_the_user_stay(before_jax, monkeypatch):
    require_deterministic_programs()
    assert os.environ["XLA_FLAGS"].split() == [*FLAGS]
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_autotune_level=4 --xla_dump_to=a")
    require_deterministic_programs()
    expected = ["--xla_gpu_autotune_level=4", "--xla_dump_to=a", FLAGS[0]]
    assert os.environ["XLA_FLAGS"].split() == expected


def test_a_gpu_that_runs_already_is_refused(before_jax, monkeypatch):
    monkeypatch.setattr(deterministic, "backends_are_initialized", lambda: True)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(ValueError, match=r"before JAX starts.*XLA_FLAGS='--xla_gpu_ex"):
        require_deterministic_programs()
    monkeypatch.setenv("XLA_FLAGS", " ".join(FLAGS))
    require_deterministic_programs()


def test_nothing_changes_on_a_cpu(command, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    arguments = ("--model", GOLDEN / "pg2", "--image", GOLDEN / "image.png", "--prompt", "ocr")
    plain = command("generate", *arguments, "--max-new-tokens", 2)
    assert command("generate", *arguments, "--max-new-tokens", 2, "--deterministic") == plain
    assert os.environ["XLA_FLAGS"] == ""


def test_xla_knows_the_flags():
    """It ends a process at a flag that it does not know."""
    environment = os.environ | {"XLA_FLAGS": " ".join(FLAGS), "JAX_PLATFORMS": "cpu"}
    code = "import jax; jax.devices()"
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
