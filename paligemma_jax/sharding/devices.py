"""The devices of this process: whether JAX sees them, their memory, their speed."""

from __future__ import annotations

import os
import resource
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import cast, get_args

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from paligemma_jax.model.config import AttentionForm

INSTALL_HINTS = {
    "cuda": "pip install 'paligemma-jax[cuda12]' (or cuda13), and check nvidia-smi for the GPU",
    "tpu": "pip install 'paligemma-jax[tpu]', on a TPU VM where no other process uses the TPU",
}
# Files that exist if the device does. A TPU has the first up to v4, the second since v5.
DEVICE_FILES = {"cuda": ("/proc/driver/nvidia/version",), "tpu": ("/dev/accel0", "/dev/vfio/0")}


def check_devices() -> None:
    """Check that JAX sees the accelerator of this machine.

    Warns if there is an accelerator but JAX runs on the CPU without being configured to.

    Raises:
        ValueError: $JAX_PLATFORMS names a device that JAX cannot use.
    """
    requested = jax.config.values["jax_platforms"] or ""
    try:
        backend = jax.default_backend()
    except (RuntimeError, AssertionError):  # jax 0.10 asserts if the CUDA plugin is missing
        platform = requested.split(",")[0].replace("gpu", "cuda")
        hint = INSTALL_HINTS.get(platform, "it must be cpu, cuda or tpu")
        raise ValueError(
            f"JAX_PLATFORMS is {requested}, but JAX finds no such device: {hint}; "
            "or unset JAX_PLATFORMS to use the default device"
        ) from None
    if backend != "cpu" or requested or os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return
    for kind, files in DEVICE_FILES.items():
        if any(Path(file).exists() for file in files):
            warnings.warn(
                f"this machine has a {kind.upper()} device, but JAX runs on the CPU: "
                f"{INSTALL_HINTS[kind]}",
                stacklevel=3,
            )


def choose_attention(form: str | None = None) -> AttentionForm:
    """Return the form of attention, by default the fastest on this platform.

    Raises:
        ValueError: There is no such form, or not on this platform.
    """
    forms = get_args(AttentionForm)
    if form not in (None, *forms):
        raise ValueError(f"attention must be one of {', '.join(forms)}, got {form!r}")
    device = jax.local_devices()[0]
    has_kernels = device.platform == "tpu" or "NVIDIA" in device.device_kind
    if form == "fused" and not has_kernels:
        name = "a CPU" if device.platform == "cpu" else device.device_kind
        raise ValueError(
            f"attention must be plain on {name}, got fused: it needs a TPU or an NVIDIA GPU"
        )
    return cast(AttentionForm, form or ("fused" if has_kernels else "plain"))


def memory_bytes() -> int:
    """Return the memory of a device if it reports that, else of this host."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("bytes_limit") or host_memory_bytes()


def host_memory_bytes() -> int:
    """Return the memory of this host, or the limit of its container."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(memory, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # no container, or no limit
        return memory


def peak_bytes() -> int:
    """Return the peak memory so far, of the device if it reports that, else of this process."""
    stats = jax.local_devices()[0].memory_stats()
    return stats["peak_bytes_in_use"] if stats else peak_resident_bytes()


def peak_resident_bytes() -> int:
    """Return the peak resident memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def program_bytes(program: jax.stages.Compiled) -> dict[str, int]:
    """Return the memory of a compiled program on each device, from the compiler's analysis.

    `output_bytes` are of results that do not reuse the memory of an argument; `memory_bytes` are
    of arguments, temporaries and results.
    """
    sizes = program.memory_analysis()
    assert sizes
    parts = {
        "argument_bytes": sizes.argument_size_in_bytes,
        "temporary_bytes": sizes.temp_size_in_bytes,
        "output_bytes": sizes.output_size_in_bytes - sizes.alias_size_in_bytes,
    }
    return parts | {"memory_bytes": sum(parts.values())}


def matrix_rate(dtype: str) -> float:
    """Measure the FLOP/s of a large square matrix product, of int8 with int32 sums. Numbers are
    random: ones and zeros take less power, so some accelerators multiply them faster."""
    side, steps = (1024, 1) if jax.default_backend() == "cpu" else (8192, 8)
    key, shape = jax.random.key(0), (side, side)
    if dtype == "int8":
        x = jax.random.randint(key, shape, -127, 128, dtype)
    else:
        x = jax.random.normal(key, shape, dtype) * side**-0.5
    return steps * 2 * side**3 / _best_time(_multiply, x, steps)


def read_rate(nbytes: int) -> float:
    """Measure the bytes/s of reading an array of `nbytes` again and again. If it fits into a cache,
    this is the speed of the cache.

    Arrays beyond all caches are equally fast, so larger ones are not allocated. Sums and products
    with a vector both only read; which of them is faster depends on the machine.
    """
    largest, total = (2**28, 2**28) if jax.default_backend() == "cpu" else (2**30, 2**34)
    width = 1024
    rows = max(1, min(nbytes, largest) // (4 * width))
    x = jnp.zeros((rows, width))
    times = max(1, total // x.nbytes)
    seconds = min(_best_time(_read_by_sum, x, times), _best_time(_read_by_product, x, times))
    return times * x.nbytes / seconds


# Many reads or products in one call, so that the call itself takes no share of the time. Each needs
# the result of the last, so the compiler cannot drop or merge them.


@partial(jax.jit, static_argnames="times")
def _multiply(x: Array, times: int) -> Array:
    sums = jnp.int32 if x.dtype == jnp.int8 else None

    def multiply(_: Array, y: Array) -> Array:
        return jnp.matmul(y, x, preferred_element_type=sums).astype(x.dtype)

    return jax.lax.fori_loop(0, times, multiply, x)


@partial(jax.jit, static_argnames="times")
def _read_by_sum(x: Float[Array, "M N"], times: int) -> Float[Array, ""]:
    return jax.lax.fori_loop(0, times, lambda _, total: (x + total).sum(), jnp.zeros(()))


@partial(jax.jit, static_argnames="times")
def _read_by_product(x: Float[Array, "M N"], times: int) -> Float[Array, " N"]:
    width = x.shape[1]
    return jax.lax.fori_loop(0, times, lambda _, y: jnp.resize(x @ y, (width,)), jnp.zeros(width))


def _best_time(function: Callable[[Array, int], Array], x: Array, times: int) -> float:
    """Return the shortest of four runs of a compiled function in seconds, after one to warm up."""
    jax.block_until_ready(function(x, times))
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        jax.block_until_ready(function(x, times))
        seconds.append(time.perf_counter() - start)
    return min(seconds)
