"""Move trees of arrays onto a mesh and back, and describe them by shape and sharding."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jaxtyping import PyTree

from paligemma_jax.sharding.axes import checked_mesh
from paligemma_jax.sharding.mesh import mesh_of
from paligemma_jax.sharding.rules import Leaf, partition_spec, shardings


def distribute(tree: PyTree, mesh: Mesh | None) -> PyTree:
    """Put a tree of parameters or optimizer state on a mesh. None leaves it unchanged.

    Arrays on a mesh are resharded. For other arrays, every process must have the full value.
    """
    if mesh is None:
        return tree

    def put(array: Array | np.ndarray, sharding: NamedSharding) -> Array:
        if isinstance(array, Array) and mesh_of(array):
            return jax.device_put(array, sharding)
        return _put_slices(array, sharding)

    return jax.tree.map(put, tree, shardings(tree, mesh))


def shard_batch(batch: PyTree, mesh: Mesh | None) -> PyTree:
    """Split a batch of host arrays by rows. Each process must fill in its `local_rows` only."""
    if mesh is None:
        return batch
    return jax.tree.map(lambda a: _put_slices(a, _batch_sharding(a.shape, mesh)), batch)


def local_rows(rows: int, mesh: Mesh | None) -> list[int]:
    """Return the rows of a batch that the devices of this process compute."""
    if mesh is None:
        return list(range(rows))
    slices = _batch_sharding((rows,), mesh).addressable_devices_indices_map((rows,))
    return sorted({row for index in slices.values() if index for row in range(rows)[index[0]]})


def to_host(array: Array | np.ndarray) -> np.ndarray:
    """Return the full value of an array. Call it in all processes at once."""
    if isinstance(array, Array) and not (array.is_fully_addressable or array.is_fully_replicated):
        array = multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)


def sharded_shapes(tree: PyTree, mesh: Mesh) -> PyTree[jax.ShapeDtypeStruct]:
    """Return the shapes of `distribute(tree, mesh)`, to compile a program without arrays."""
    return jax.tree.map(shape_struct, tree, shardings(tree, mesh))


def batch_shapes(batch: PyTree, mesh: Mesh) -> PyTree[jax.ShapeDtypeStruct]:
    """Return the shapes of `shard_batch(batch, mesh)`."""
    return jax.tree.map(lambda a: shape_struct(a, _batch_sharding(a.shape, mesh)), batch)


def shape_struct(array: Leaf, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    """Return the shape and dtype of an array with another sharding."""
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)


def _batch_sharding(shape: Sequence[int], mesh: Mesh) -> NamedSharding:
    mesh = checked_mesh(mesh)
    return NamedSharding(mesh, partition_spec(["B"], shape, mesh))


def _put_slices(array: Array | np.ndarray, sharding: NamedSharding) -> Array:
    values = np.asarray(array)
    return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])
