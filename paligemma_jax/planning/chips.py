"""Published specifications of accelerators, and the names of slices: "v5e:4x4", "h200x8"."""

from __future__ import annotations

import math
import os
import re
import sys
from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """The published specifications of an accelerator."""

    memory: float  # bytes; on TPUs what libtpu 0.0.42 gives a program of 16, 95 and 32 GB
    flops: float  # bfloat16 FLOP/s, dense
    bandwidth: float  # bytes/s from and to that memory
    links: float  # bytes/s sent to other chips
    source: str
    clock: float = 0.0  # Hz, of the cycles that the TPU compiler counts
    axes: int = 0  # of the shape of a slice; 0 if programs cannot be compiled without the chip


GB = 1e9
_TPU = "https://cloud.google.com/tpu/docs/"
_GPU = "https://www.nvidia.com/en-us/data-center/"
# links: half of the published figure, which counts both directions. clock: the FLOP/s divided by
# those of the matrix units in a cycle, 4 x 128 x 128 x 2 on v5e (1.5 GHz, as in "How to Scale Your
# Model", jax-ml.github.io/scaling-book/tpus), twice that on v5p and four times that on v6e.
CHIPS = {
    "v5e": Chip(15.75 * 2**30, 197e12, 819 * GB, 200 * GB, _TPU + "v5e", 1.5e9, axes=2),
    "v5p": Chip(95.74 * 2**30, 459e12, 2765 * GB, 600 * GB, _TPU + "v5p", 1.75e9, axes=3),
    "v6e": Chip(31.25 * 2**30, 918e12, 1640 * GB, 400 * GB, _TPU + "v6e", 1.75e9, axes=2),
    "a100-40g": Chip(40 * GB, 312e12, 1555 * GB, 300 * GB, _GPU + "a100/"),
    "a100-80g": Chip(80 * GB, 312e12, 2039 * GB, 300 * GB, _GPU + "a100/"),
    "h100": Chip(80 * GB, 989e12, 3350 * GB, 450 * GB, _GPU + "h100/"),
    "h200": Chip(141 * GB, 989e12, 4800 * GB, 450 * GB, _GPU + "h200/"),
}
SHAPE_EXAMPLES = {0: "x8", 2: ":2x4", 3: ":2x2x2"}  # by the number of axes


@dataclass(frozen=True)
class Slice:
    """Several linked chips of one kind."""

    name: str
    chip: Chip
    count: int

    @classmethod
    def parse(cls, name: str) -> Slice:
        """Parse "v5e:4x4" (16 chips), "h200x8" (8) or "h200" (1).

        Raises:
            ValueError: The name is not of this form, or the chip is unknown.
        """
        match = re.fullmatch(r"([^:]+?)(?::(\d+(?:x\d+)+)|x(\d+))?", name)
        chip = CHIPS.get(match[1]) if match else None
        if match and chip:
            shape = [int(size) for size in match[2].split("x")] if match[2] else []
            count = math.prod(shape) if shape else int(match[3] or 1)
            if len(shape) == chip.axes and count:
                return cls(name, chip, count)
        known = ", ".join(kind + SHAPE_EXAMPLES[chip.axes] for kind, chip in CHIPS.items())
        raise ValueError(
            f"--on must name a chip and a number or shape, like {known}; got {name!r}. Cloud TPU's "
            "v5e-8 or v5litepod-8 is v5e:2x4 here; its v5p-16 has 16 cores and is v5p:2x2x2"
        )


def simulate_devices(count: int) -> None:
    """Let CPU devices stand in for `count` chips, and do not search for a TPU.

    Call it before jax is imported.
    """
    if "jax" not in sys.modules:
        flags = f"{os.environ.get('XLA_FLAGS', '')} {device_count_flag(count)}"
        os.environ |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    # Compiling for a TPU needs neither the metadata server nor a lock on the device.
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}


def device_count_flag(count: int) -> str:
    """Return the XLA flag that gives a process `count` CPU devices."""
    return f"--xla_force_host_platform_device_count={count}"
