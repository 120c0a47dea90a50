"""Where every parameter lies on a mesh: path -> axis letters -> mesh axes. The only file that knows a mesh."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")

# The axis letters of model/layers.py. What no row names (norms, biases of one axis) is small and lies on every device.
PARAMETERS = [
    (r"decoder/embedder/table", "V D"),
    (r"projector/kernel", "D W"),
    (r"vision/patch/kernel", "W U"),
    (r"vision/position", "P W"),
    (r"decoder/.*/attention/q/kernel", "N H D"),
    (r"decoder/.*/attention/[kv]/kernel", "K H D"),
    (r"decoder/.*/attention/o/kernel", "D N H"),
    (r"vision/.*/attention/[qkv]/kernel", "N H W"),
    (r"vision/.*/attention/[qkv]/bias", "N H"),
    (r"vision/.*/attention/o/kernel", "W N H"),
    (r"decoder/.*/mlp/(gate|up)/kernel", "F D"),
    (r"decoder/.*/mlp/down/kernel", "D F"),
    (r"vision/.*/mlp/up/kernel", "F W"),
    (r"vision/.*/mlp/down/kernel", "W F"),
]

# Heads, MLP and vocabulary are split for tensor parallelism; what is left of a matrix for fully sharded data parallelism.
MESH_AXIS = {"V": "tensor", "N": "tensor", "K": "tensor", "F": "tensor", "D": "fsdp", "W": "fsdp"}


def make_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of data * fsdp * tensor devices. ValueError if there are not that many."""
    sizes, have = (data, fsdp, tensor), len(devices or jax.devices())
    if math.prod(sizes) > have:
        raise ValueError(f"a mesh of {' x '.join(map(str, sizes))} needs {math.prod(sizes)} devices; there are {have}")
    chosen = (devices or jax.devices())[: math.prod(sizes)]
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3, devices=chosen)


def shardings(shapes: Mapping[str, Sequence[int]], mesh: Mesh) -> dict[str, NamedSharding]:
    """The sharding of every parameter path -> shape. An axis that its mesh axis does not divide is whole on every device, and said once."""
    found, whole = {}, set()
    for path, shape in shapes.items():
        letters = next((row.split() for pattern, row in PARAMETERS if re.fullmatch(pattern, path)), [])
        spec: list[str | None] = []
        for letter, size in zip(letters, shape):
            axis = MESH_AXIS.get(letter)
            ways = mesh.shape.get(axis, 1) if axis else 1
            spec.append(axis if ways > 1 and size % ways == 0 and axis not in spec else None)
            if size % ways:
                whole.add(f"{letter} ({size}) over {axis} ({ways})")
        found[path] = NamedSharding(mesh, PartitionSpec(*spec))
    if whole:
        warnings.warn(f"not divisible, so whole on every device: {', '.join(sorted(whole))}", stacklevel=2)
    return found
