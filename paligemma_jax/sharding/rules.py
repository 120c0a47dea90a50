"""."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")
AnyMesh = Mesh | AbstractMesh


# The axis letters of model/layers.py, of paths without the layer's number; a stack has one more axis, L, in front.
# Biases, quantized kernels and the factors of LoRA go by the kernel whose place they share. What no row names (norms) is small and lies whole
# on every device.
ARRAY_AXES = [
    (r"decoder/embedder/(table|codes|scale)", "V D"),
    (r"projector/kernel", "D W"),
    (r"vision/patch/kernel", "W U"),
    (r"vision/position", "P W"),
    (r"decoder/layers/attention/q/kernel", "N H D"),
    (r"decoder/layers/attention/[kv]/kernel", "K H D"),
    (r"decoder/layers/attention/o/kernel", "D N H"),
    (r"vision/layers/attention/[qkv]/kernel", "N H W"),
    (r"vision/layers/attention/o/kernel", "W N H"),
    (r"decoder/layers/mlp/(gate|up)/kernel", "F D"),
    (r"decoder/layers/mlp/down/kernel", "D F"),
    (r"vision/layers/mlp/up/kernel", "F W"),
    (r"vision/layers/mlp/down/kernel", "W F"),
]


# Heads, MLP and vocabulary are split for tensor parallelism; what is left of a matrix for fully sharded data parallelism. Rows of a batch
# (and its images) are split over both kinds of data parallelism, the tokens between two blocks over the devices that share their rows
# (sequence parallelism, arXiv:2205.05198).
MESH_AXES = {
    "V": ("tensor",),
    "N": ("tensor",),
    "K": ("tensor",),
    "F": ("tensor",),
    "T": ("tensor",),
    "D": ("fsdp",),
    "W": ("fsdp",),
    "B": ("data", "fsdp"),
}


def axis_letters(path: str, ndim: int) -> list[str]:
    """The letters of an array's axes, wherever in a tree it is; none for what lies whole on every device."""
    found = re.search(r"(?:^|/)((?:vision|projector|decoder)/.*)", path)
    if not found:
        return []
    plain = re.sub(r"/(?:base|\d+)(?=/|$)", "", found[1])
    module, _, name = plain.rpartition("/")
    names = (plain, f"{module}/kernel", f"{module}/table")
    row = next((row.split() for pattern, row in ARRAY_AXES if any(re.fullmatch(pattern, name) for name in names)), None)
    if row is None:
        return []
    lead = ["L"] if re.search(r"layers/\D", found[1]) else []
    own = ndim - len(lead)
    if name == "lora_a":
        return [*lead, "R", *row[len(row) + 1 - own :]]
    return [*lead, *row[: own - 1], "R"] if name == "lora_b" else [*lead, *row[:own]]


def partition_spec(axes: Sequence[str], shape: Sequence[int], mesh: AnyMesh) -> PartitionSpec:
    """Which mesh axes split each axis of an array: those of its letter, as far as they divide it and
    no other axis has them. B comes last: it takes the data axes that the other letters leave."""
    spec: list[tuple[str, ...]] = [()] * min(len(axes), len(shape))
    for i in sorted(range(len(spec)), key=lambda i: axes[i] == "B"):
        for axis in MESH_AXES.get(axes[i], ()):
            size, taken = mesh.shape.get(axis, 1), any(axis in other for other in spec)
            ways = size * math.prod(mesh.shape[other] for other in spec[i])
            if size > 1 and not taken and shape[i] % ways == 0:
                spec[i] += (axis,)
    return PartitionSpec(*(names if len(names) > 1 else names[0] if names else None for names in spec))


def partition_specs(tree: Any, mesh: Any) -> Any:
    """The `PartitionSpec` of every array, or shape, of a tree: a model, what learns, an optimizer's state.

    An axis of a kernel that its mesh axis does not divide is whole on every device, and said once.
    """

    def one(path: tuple, leaf: Any) -> PartitionSpec:
        name = jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")
        axes = axis_letters(name, len(leaf.shape))
        if name.endswith(("kernel", "table", "codes")):
            wanted = [(letter, size, axis, mesh.shape.get(axis, 1)) for letter, size in zip(axes, leaf.shape) for axis in MESH_AXES.get(letter, ())]
            for letter, size, axis, ways in wanted:
                if size % ways:
                    _say(f"{letter} of {size} is not divisible by {axis}={ways}, so it is whole on every device ({name})")
        return partition_spec(axes, leaf.shape, mesh)

    return jax.tree_util.tree_map_with_path(one, tree)


_said: set[str] = set()


def _say(text: str) -> None:
    """Once for every axis, not for every layer."""
    if (what := text.partition(" (")[0]) not in _said:
        _said.add(what)
        warnings.warn(text, stacklevel=5)


def shardings(tree: Any, mesh: Mesh) -> Any:
    """`partitions` on a mesh of devices."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), partition_specs(tree, mesh))


def sharded_shapes(tree: Any, mesh: Mesh) -> Any:
    """The shapes of a tree with their shardings: what a program is compiled for, without a single array."""
    return jax.tree.map(lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), tree, shardings(tree, mesh))
