"""Time contenders in alternation, beside what the machine reaches at best."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

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


def describe_machine(dtype: str) -> Record:
    """Return the device, its platform, the cores of this host, the dtype and the version of jax."""
    device = jax.local_devices()[0]
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "cores": os.cpu_count(),
        "dtype": dtype,
        "jax": jax.__version__,
    }


def default_dtype() -> str:
    """The dtype to measure in, by default."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"
