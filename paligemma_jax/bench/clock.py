"""Time contenders in alternation, and measure the machine itself."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from paligemma_jax.sharding.devices import best_time, matrix_rate

OURS = "paligemma-jax"  # the name of this implementation in reports
Run = Callable[[], tuple[float, float]]  # returns seconds to the first token, and after it
Record = dict[str, Any]  # printed by --json: numbers, strings and nested records


def alternate(contenders: Mapping[str, Run], repeats: int) -> dict[str, Float[np.ndarray, "2 N"]]:
    """Run each contender once to warm up, then all in turn. Returns their seconds by name."""
    for run in contenders.values():
        run()
    times = [[run() for run in contenders.values()] for _ in range(repeats)]
    return {name: np.array([turn[i] for turn in times]).T for i, name in enumerate(contenders)}


def spread(values: Float[np.ndarray, " N"]) -> dict[str, float]:
    """Return the median, minimum and maximum."""
    return {"median": float(np.median(values)), "min": values.min(), "max": values.max()}


def measure_machine(dtype: str) -> Record:
    """Measure the bandwidth of a large copy (bytes read and written per second) and the FLOP/s of a
    large square matrix product, best of 8."""
    device = jax.local_devices()[0]
    is_cpu = device.platform == "cpu"
    array = jnp.ones(2**26 if is_cpu else 2**29, jnp.float32)
    copy_seconds = best_time(jax.jit(lambda x: x + 1), array)
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "cores": os.cpu_count(),
        "dtype": dtype,
        "jax": jax.__version__,
        "copy_bytes_s": 2 * array.nbytes / copy_seconds,
        "matrix_flops_s": matrix_rate(dtype, 2048 if is_cpu else 8192),
    }


def default_dtype() -> str:
    """The dtype to measure in, by default."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"
