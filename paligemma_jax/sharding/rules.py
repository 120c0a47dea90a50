"""How arrays are split: parameter path -> axis letters -> mesh axes."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from paligemma_jax.sharding.axes import checked_mesh

Leaf = jax.Array | np.ndarray | jax.ShapeDtypeStruct

# The mesh axes that split each axis letter. Tensor parallelism splits heads, MLP and vocabulary;
# fully sharded data parallelism splits the other axis of each matrix. Both kinds of data
# parallelism split the rows of a batch and its images. Between blocks, the devices that share rows
# split the tokens (sequence parallelism, arXiv:2205.05198). In the loss, all devices but those of
# `data` split the vocabulary.
AXIS_RULES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys("VNKFT", ("tensor",)),
    **dict.fromkeys("DW", ("fsdp",)),
    "B": ("data", "fsdp"),
    "Z": ("tensor", "fsdp"),
}

# The axis letters (model/layers.py) of each parameter. Paths have no layer number; stacked
# parameters have a leading axis L. Biases, quantized kernels and LoRA factors follow the kernel of
# their module. Parameters without a row (norms) are small and replicated.
PARAMETER_AXES = [
    (r"decoder/(embedder|head)/(table|codes|scale)", "V D"),
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


def axis_letters(path: str, ndim: int) -> list[str]:
    """Return the axis letters of an array by its path in a model, gradient or optimizer state.

    Empty for arrays that every device replicates.
    """
    match = re.search(r"(?:^|/)((?:vision|projector|decoder)/.*)", path)
    if not match:
        return []
    plain = re.sub(r"/(?:base|\d+)(?=/|$)", "", match[1])
    module, _, name = plain.rpartition("/")
    candidates = (plain, f"{module}/kernel", f"{module}/table")
    for pattern, axes in PARAMETER_AXES:
        if any(re.fullmatch(pattern, candidate) for candidate in candidates):
            letters = axes.split()
            break
    else:
        return []
    lead = ["L"] if re.search(r"layers/\D", match[1]) else []
    own = ndim - len(lead)
    if name == "lora_a":
        return [*lead, "R", *letters[len(letters) + 1 - own :]]
    if name == "lora_b":
        return [*lead, *letters[: own - 1], "R"]
    return [*lead, *letters[:own]]


def partition_spec(
    axes: Sequence[str], shape: Sequence[int], mesh: Mesh | AbstractMesh
) -> PartitionSpec:
    """Return the mesh axes that split each axis of an array.

    Each letter gets the mesh axes of `AXIS_RULES` that divide it and that no other axis of the
    array uses. B comes last, with the data axes that the other letters leave. Axes at the end that
    nothing splits are left out, as in the shardings of results: programs are cached by them.
    """
    spec: list[tuple[str, ...]] = [()] * min(len(axes), len(shape))
    for i in sorted(range(len(spec)), key=lambda i: axes[i] == "B"):
        for axis in AXIS_RULES.get(axes[i], ()):
            size = mesh.shape.get(axis, 1)
            used = any(axis in names for names in spec)
            ways = size * math.prod(mesh.shape[name] for name in spec[i])
            if size > 1 and not used and shape[i] % ways == 0:
                spec[i] += (axis,)
    while spec and not spec[-1]:
        spec.pop()
    return PartitionSpec(
        *(names if len(names) > 1 else names[0] if names else None for names in spec)
    )


def partition_specs(tree: PyTree, mesh: Mesh | AbstractMesh) -> PyTree[PartitionSpec]:
    """Return the `PartitionSpec` of every array or shape of a tree: a model, trainable parameters,
    an optimizer state.

    A kernel axis that its mesh axis does not divide is replicated, with one warning per axis.
    """

    def leaf_spec(key_path: tuple, leaf: Leaf) -> PartitionSpec:
        path = jax.tree_util.keystr(key_path, simple=True, separator="/").removesuffix("/value")
        axes = axis_letters(path, len(leaf.shape))
        if path.endswith(("kernel", "table", "codes")):
            for letter, size in zip(axes, leaf.shape, strict=False):
                for axis in AXIS_RULES.get(letter, ()):
                    if size % mesh.shape.get(axis, 1):
                        _warn_replicated(letter, size, axis, mesh.shape[axis], path)
        return partition_spec(axes, leaf.shape, mesh)

    return jax.tree_util.tree_map_with_path(leaf_spec, tree)


_warned: set[str] = set()


def _warn_replicated(letter: str, size: int, axis: str, ways: int, path: str) -> None:
    """Warn once per axis, not once per layer."""
    reason = f"axis {letter} of size {size} is not divisible by {axis}={ways}"
    if reason not in _warned:
        _warned.add(reason)
        warnings.warn(f"{reason}, so every device replicates it ({path})", stacklevel=5)


def shardings(tree: PyTree, mesh: Mesh) -> PyTree[NamedSharding]:
    """Return the `NamedSharding` of every array or shape of a tree (`partition_specs`)."""
    mesh = checked_mesh(mesh)
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), partition_specs(tree, mesh))
