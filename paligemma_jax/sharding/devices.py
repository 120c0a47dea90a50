"""Whether jax finds the devices that are there, what to do where it does not, and how much of their memory was used."""

from __future__ import annotations

import os
import resource
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp

EXTRAS = {
    "cuda": "pip install 'paligemma-jax[cuda12]' (or cuda13), and see whether nvidia-smi shows the GPU",
    "tpu": "pip install 'paligemma-jax[tpu]', on a TPU VM that no other process uses",
}
# What is there where the device is; a TPU lies at the first place up to v4, at the second since v5.
SIGNS = {"cuda": ("/proc/driver/nvidia/version",), "tpu": ("/dev/accel0", "/dev/vfio/0")}


def check_devices() -> None:
    """ValueError if JAX_PLATFORMS asks for what jax cannot find; a warning if there is an accelerator, but not for this build of jax."""
    asked = jax.config.values["jax_platforms"] or ""
    try:
        found = jax.default_backend()
    except (RuntimeError, AssertionError):  # the latter is how jax 0.10 tells of JAX_PLATFORMS=cuda without its plugin
        first = asked.split(",")[0].replace("gpu", "cuda")
        remedy = EXTRAS.get(first, "it can be cpu, cuda or tpu")
        raise ValueError(f"JAX_PLATFORMS is {asked}, but jax finds no such device: {remedy}; or unset it, and jax takes what there is") from None
    if found == "cpu" and not asked and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
        for kind in (kind for kind, signs in SIGNS.items() if any(Path(sign).exists() for sign in signs)):
            warnings.warn(f"there is a {kind.upper()} device, but jax computes on the CPU: {EXTRAS[kind]}", stacklevel=3)


def peak_bytes() -> int:
    """The most that was in use so far: on the device where it counts that, else of this process."""
    stats = jax.local_devices()[0].memory_stats()
    return stats["peak_bytes_in_use"] if stats else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def matrix_rate(dtype: str, side: int | None = None) -> float:
    """FLOP per second of a big square product on this machine, best of a few."""
    side = side or (1024 if jax.default_backend() == "cpu" else 8192)
    return 2 * side**3 / best_time(jax.jit(lambda x: x @ x), jnp.ones((side, side), dtype))


def best_time(function: Callable, x: jax.Array, repeats: int = 8) -> float:
    """Seconds."""
    jax.block_until_ready(function(x))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function(x))
        times.append(time.perf_counter() - start)
    return min(times)
