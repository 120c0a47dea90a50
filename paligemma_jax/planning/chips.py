"""What accelerators are published to do, and how slices of them are named: "v5e:4x4", "h200x8"."""

from __future__ import annotations

import math
import os
import re
import sys
from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """One of them, by its maker's figures."""

    memory: float  # bytes; of TPUs those that their compiler (libtpu 0.0.42) lets a program use: of 16, 95 and 32 GB
    flops: float  # per second, bfloat16, dense
    bandwidth: float  # of that memory, bytes per second
    links: float  # to the other chips, bytes per second that it can send
    source: str
    axes: int = 0  # of a slice; 0: no compiler that works without the chip


GB = 1e9
_TPU = "https://cloud.google.com/tpu/docs/"
_GPU = "https://www.nvidia.com/en-us/data-center/"
CHIPS = {  # links: half of the published figure, which counts both directions
    "v5e": Chip(15.75 * 2**30, 197e12, 819 * GB, 200 * GB, _TPU + "v5e", 2),
    "v5p": Chip(95.74 * 2**30, 459e12, 2765 * GB, 600 * GB, _TPU + "v5p", 3),
    "v6e": Chip(31.25 * 2**30, 918e12, 1640 * GB, 400 * GB, _TPU + "v6e", 2),
    "a100-40g": Chip(40 * GB, 312e12, 1555 * GB, 300 * GB, _GPU + "a100/"),
    "a100-80g": Chip(80 * GB, 312e12, 2039 * GB, 300 * GB, _GPU + "a100/"),
    "h100": Chip(80 * GB, 989e12, 3350 * GB, 450 * GB, _GPU + "h100/"),
    "h200": Chip(141 * GB, 989e12, 4800 * GB, 450 * GB, _GPU + "h200/"),
}


@dataclass(frozen=True)
class Slice:
    name: str  # as asked for
    chip: Chip
    count: int


def find_slice(name: str) -> Slice:
    """ "v5e:4x4" -> 16 chips of v5e, "h200x8" -> 8 of h200, "h200" -> one. ValueError for what is not known."""
    kind, shape = (name.split(":", 1) + [""])[:2]
    plain = re.fullmatch(r"(.+?)x(\d+)", name)
    if re.fullmatch(r"\d+(x\d+)+", shape) and kind in CHIPS and CHIPS[kind].axes == len(sides := shape.split("x")):
        return _checked(name, kind, math.prod(map(int, sides)))
    if name in CHIPS and not CHIPS[name].axes:
        return _checked(name, name, 1)
    if plain and plain[1] in CHIPS and not CHIPS[plain[1]].axes:
        return _checked(name, plain[1], int(plain[2]))
    known = ", ".join(kind + {0: "x8", 2: ":2x4", 3: ":2x2x2"}[chip.axes] for kind, chip in CHIPS.items())
    rented = "what is rented as v5e-8 or v5litepod-8 is v5e:2x4, and v5p-16, of 16 cores, v5p:2x2x2"
    raise ValueError(f"--on {name}: not known; name a chip and how many, as in {known}; {rented}")


def _checked(name: str, kind: str, count: int) -> Slice:
    if not count:
        raise ValueError(f"--on {name}: no chips")
    return Slice(name, CHIPS[kind], count)


def prepare(count: int) -> None:
    """Before jax is imported: so many devices of a CPU to stand for the chips, and no search for a TPU."""
    if "jax" not in sys.modules:
        os.environ |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flag(count)}"}
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}  # a compiler is no reason to ask who has the chip


def flag(count: int) -> str:
    return f"--xla_force_host_platform_device_count={count}"
