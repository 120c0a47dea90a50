"""Where every array lies on a mesh: path -> axis letters -> mesh axes. The only file that knows a mesh."""

from __future__ import annotations

import functools
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from paligemma_jax.model.config import PaliGemmaConfig
from paligemma_jax.model.layers import placing

AXES = ("data", "fsdp", "tensor")

# The axis letters of model/layers.py, of paths without the layer's number; a stack has one more axis, L, in front.
# Biases, quantized kernels and the factors of LoRA go by the kernel whose place they share. What no row names (norms) is small and lies whole
# on every device.
ARRAYS = [
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
    "V": ("tensor",), "N": ("tensor",), "K": ("tensor",), "F": ("tensor",), "D": ("fsdp",), "W": ("fsdp",),
    "rows": ("data", "fsdp"), "replicas": ("data",), "tokens": ("tensor",),
}  # fmt: skip


def make_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of data * fsdp * tensor devices. ValueError if there are not that many."""
    sizes, have = (data, fsdp, tensor), len(devices or jax.devices())
    if math.prod(sizes) > have:
        raise ValueError(f"a mesh of {' x '.join(map(str, sizes))} needs {math.prod(sizes)} devices; there are {have}")
    chosen = (devices or jax.devices())[: math.prod(sizes)]
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3, devices=chosen)


def find_mesh(
    mesh: str | Mesh | None, config: PaliGemmaConfig, training: bool = False, devices: Sequence[Any] | None = None, rows: int = 0
) -> Mesh | None:
    """The mesh that "data=2,fsdp=4,tensor=2" names (what is left out is 1), or "auto"; a `Mesh` with axes of these names is taken as it is.

    auto: to train, all devices are fsdp, or as many as divide the `rows` of a batch, and the rest tensor; to answer, as many are tensor as divide
    the key heads, so that no weight travels and each holds its own heads' part of the cache, and the rest data. A single key head (PaliGemma 1)
    lies whole on each, and the query heads are divided.
    devices: by default, to train, those of all processes; to answer, this one's: each process then answers by itself.
    """
    if isinstance(mesh, Mesh):
        if not {*mesh.axis_names} <= {*AXES} or {*mesh.axis_types} != {AxisType.Auto}:
            raise ValueError(f"a mesh of axes {mesh.axis_names}: they can be {', '.join(AXES)}, of AxisType.Auto; see scaling.sharding.make_mesh")
        return mesh
    if mesh is None:
        return None
    devices = devices or (jax.devices() if training else jax.local_devices())
    have = len(devices)
    if mesh == "auto":
        if training:
            fsdp = math.gcd(have, rows)  # with 0 rows all
            return make_mesh(fsdp=fsdp, tensor=have // fsdp, devices=devices)
        decoder = config.decoder
        heads = math.gcd(have, decoder.num_key_value_heads if decoder.num_key_value_heads > 1 else decoder.num_attention_heads)
        return make_mesh(data=have // heads, tensor=heads, devices=devices)
    sizes = {}
    for part in mesh.split(","):
        name, _, size = part.strip().partition("=")
        if name not in AXES or name in sizes or not size.isdecimal() or int(size) < 1:
            raise ValueError(f"mesh {mesh!r}: {part!r} is none of {'=N, '.join(AXES)}=N; for example data=2,fsdp=4, or auto")
        sizes[name] = int(size)
    return make_mesh(**sizes, devices=devices)


def letters(path: str, ndim: int) -> list[str]:
    """The letters of an array's axes, wherever in a tree it is; none for what lies whole on every device."""
    found = re.search(r"(?:^|/)((?:vision|projector|decoder)/.*)", path)
    if not found:
        return []
    plain = re.sub(r"/(?:base|\d+)(?=/|$)", "", found[1])
    module, _, name = plain.rpartition("/")
    names = (plain, f"{module}/kernel", f"{module}/table")
    row = next((row.split() for pattern, row in ARRAYS if any(re.fullmatch(pattern, name) for name in names)), None)
    if row is None:
        return []
    lead = ["L"] if re.search(r"layers/\D", found[1]) else []
    own = ndim - len(lead)
    if name == "lora_a":
        return [*lead, "R", *row[len(row) + 1 - own :]]
    return [*lead, *row[: own - 1], "R"] if name == "lora_b" else [*lead, *row[:own]]


def partition(axes: Sequence[str], shape: Sequence[int], mesh: Any) -> PartitionSpec:
    """Which mesh axes split each axis: those that its letter asks for, as far as they divide it and no axis before has them."""
    found: list[Any] = []
    for letter, size in zip(axes, shape):
        ways: list[str] = []
        for axis in MESH_AXES.get(letter, ()):
            n, free = mesh.shape.get(axis, 1), not any(axis in np.atleast_1d(other) for other in found if other)
            if n > 1 and free and size % (n * math.prod(mesh.shape[way] for way in ways)) == 0:
                ways.append(axis)
        found.append(tuple(ways) if len(ways) > 1 else ways[0] if ways else None)
    return PartitionSpec(*found)


def partitions(tree: Any, mesh: Any) -> Any:
    """The `PartitionSpec` of every array, or shape, of a tree: a model, what learns, an optimizer's state.

    An axis of a kernel that its mesh axis does not divide is whole on every device, and said once.
    """

    def one(path: tuple, leaf: Any) -> PartitionSpec:
        name = jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")
        axes = letters(name, len(leaf.shape))
        if name.endswith(("kernel", "table", "codes")):
            wanted = [(letter, size, axis, mesh.shape.get(axis, 1)) for letter, size in zip(axes, leaf.shape) for axis in MESH_AXES.get(letter, ())]
            for letter, size, axis, ways in wanted:
                if size % ways:
                    _say(f"{letter} of {size} is not divisible by {axis}={ways}, so it is whole on every device ({name})")
        return partition(axes, leaf.shape, mesh)

    return jax.tree_util.tree_map_with_path(one, tree)


_said: set[str] = set()


def _say(text: str) -> None:
    """Once for every axis, not for every layer."""
    if (what := text.partition(" (")[0]) not in _said:
        _said.add(what)
        warnings.warn(text, stacklevel=5)


def shardings(tree: Any, mesh: Mesh) -> Any:
    """`partitions` on a mesh of devices."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), partitions(tree, mesh))


def shapes(tree: Any, mesh: Mesh) -> Any:
    """The shapes of a tree with their shardings: what a program is compiled for, without a single array."""
    return jax.tree.map(lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), tree, shardings(tree, mesh))


def distribute(tree: Any, mesh: Mesh | None) -> Any:
    """The tree on the devices of a mesh; what is there already stays. Of several processes, each has the whole of what is not."""

    def put(array: Any, place: NamedSharding) -> Array:
        return jax.device_put(array, place) if isinstance(array, Array) and mesh_of(array) else _scatter(array, place)

    return jax.tree.map(put, tree, shardings(tree, mesh)) if mesh else tree


def spread(batch: Any, mesh: Mesh | None) -> Any:
    """A batch of arrays of the host, split by rows; of several processes each needs its `own_rows` only."""
    if mesh is None:
        return batch
    return jax.tree.map(lambda array: _scatter(array, _by_rows(array.shape, mesh)), batch)


def row_shapes(batch: Any, mesh: Mesh) -> Any:
    """The shapes of a batch with the shardings that `spread` gives it."""
    return jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=_by_rows(array.shape, mesh)), batch)


def _by_rows(shape: Sequence[int], mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, partition(["rows"], shape, mesh))


def row_ways(mesh: Mesh | None) -> int:
    """Into how many slices of equal size the rows of a batch are cut; what they do not divide lies whole on every device."""
    return math.prod(mesh.shape.get(axis, 1) for axis in MESH_AXES["rows"]) if mesh else 1


def room(rows: int, mesh: Mesh | None) -> int:
    """Rows of the batch in which so many are answered: a power of two, for few compiled programs, for each of the slices."""
    ways = row_ways(mesh)
    return ways << (-(-rows // ways) - 1).bit_length()


def check_rows(flag: str, rows: int, parts: int, mesh: Mesh | None) -> None:
    """ValueError where every device would compute all rows of each of a batch's parts."""
    if rows % (parts * (ways := row_ways(mesh))):
        each = f" in {parts} parts" if parts > 1 else ""
        raise ValueError(f"{flag} {rows}{each} does not divide over data x fsdp = {ways}: give a multiple of {parts * ways}, or another --mesh")


def own_rows(rows: int, mesh: Mesh | None) -> list[int]:
    """Which rows of a batch the devices of this process hold."""
    if mesh is None:
        return list(range(rows))
    places = _by_rows((rows,), mesh).addressable_devices_indices_map((rows,))
    return sorted({row for index in places.values() if index for row in range(rows)[index[0]]})


def _scatter(array: Any, place: NamedSharding) -> Array:
    host = np.asarray(array)
    return jax.make_array_from_callback(host.shape, place, lambda index: host[index])


def host(array: Any) -> np.ndarray:
    """The whole array in this process, wherever its parts lie; all processes of a run ask at once."""
    if getattr(array, "is_fully_addressable", True) or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def mesh_of(tree: Any) -> Mesh | None:
    """The mesh on which a tree of arrays, or of `shapes`, lies; None where it is on one device."""
    sharding = getattr(next(iter(jax.tree.leaves(tree)), None), "sharding", None)
    return sharding.mesh if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh) else None


@contextmanager
def on(mesh: Mesh | None) -> Iterator[None]:
    """What is traced inside is for this mesh: `place` is heard. None changes nothing."""
    if mesh is None:
        yield
        return
    with jax.set_mesh(mesh), placing(_place):
        yield


def _place(axes: str, x: Array) -> Array:
    return jax.lax.with_sharding_constraint(x, partition(axes.split(), x.shape, jax.sharding.get_abstract_mesh()))


def settle(tree: Any) -> Any:
    """In what is traced for a mesh: the arrays of a tree where `partitions` says; elsewhere nothing."""
    mesh = jax.sharding.get_abstract_mesh()
    return tree if mesh.empty else jax.lax.with_sharding_constraint(tree, partitions(tree, mesh))


class compiled:
    """`jax.jit`, traced for the mesh where the first argument lies, and run there."""

    def __init__(self, function: Callable, **options: Any):
        self.program: Any = jax.jit(function, **options)
        functools.update_wrapper(self, function)

    def __call__(self, first: Any, *rest: Any, **named: Any) -> Any:
        with on(mesh_of(first)):
            return self.program(first, *rest, **named)

    def lower(self, first: Any, *rest: Any, **named: Any) -> Any:
        with on(mesh_of(first)):
            return self.program.lower(first, *rest, **named)

    def _cache_size(self) -> int:
        return self.program._cache_size()
