"""Deterministic programs on GPUs."""

from __future__ import annotations

import os

import jax
from jax._src.xla_bridge import backends_are_initialized  # jax has no public name for it

# The first excludes kernels that add in any order, the second the choice of kernels by their speed
# (https://openxla.org/xla/determinism).
FLAGS = ("--xla_gpu_exclude_nondeterministic_ops=true", "--xla_gpu_autotune_level=0")


def require_deterministic_programs() -> None:
    """Have XLA compile programs for GPUs whose results do not vary between runs.

    XLA reads its flags once, when JAX starts its first backend. Flags that are already in
    $XLA_FLAGS stay. Nothing changes on CPUs and TPUs, where these flags have no meaning.

    Raises:
        ValueError: JAX already runs on a GPU without these flags.
    """
    given = os.environ.get("XLA_FLAGS", "")
    missing = [flag for flag in FLAGS if flag.split("=")[0] not in given]
    if not missing or not _may_use_gpu():
        return
    if not backends_are_initialized():
        os.environ["XLA_FLAGS"] = " ".join([*given.split(), *missing])
    elif jax.default_backend() == "gpu":
        raise ValueError(
            "--deterministic must be given before JAX starts, but it already runs: "
            f"set XLA_FLAGS='{' '.join(FLAGS)}' in the environment"
        )


def _may_use_gpu() -> bool:
    return jax.config.values["jax_platforms"] not in ("cpu", "tpu")
