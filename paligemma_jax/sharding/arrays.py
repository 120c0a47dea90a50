"""."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from paligemma_jax.sharding.mesh import mesh_of
from paligemma_jax.sharding.rules import partition_spec, shardings


def distribute(tree: Any, mesh: Mesh | None) -> Any:
    """The tree on the devices of a mesh; what is there already stays. Of several processes, each has the whole of what is not."""

    def put(array: Any, place: NamedSharding) -> Array:
        return jax.device_put(array, place) if isinstance(array, Array) and mesh_of(array) else _scatter(array, place)

    return jax.tree.map(put, tree, shardings(tree, mesh)) if mesh else tree


def shard_batch(batch: Any, mesh: Mesh | None) -> Any:
    """A batch of arrays of the host, split by rows; of several processes each needs its `own_rows` only."""
    if mesh is None:
        return batch
    return jax.tree.map(lambda array: _scatter(array, _by_rows(array.shape, mesh)), batch)


def batch_shapes(batch: Any, mesh: Mesh) -> Any:
    """The shapes of a batch with the shardings that `spread` gives it."""
    return jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=_by_rows(array.shape, mesh)), batch)


def _by_rows(shape: Sequence[int], mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, partition_spec(["B"], shape, mesh))


def local_rows(rows: int, mesh: Mesh | None) -> list[int]:
    """Which rows of a batch the devices of this process hold."""
    if mesh is None:
        return list(range(rows))
    places = _by_rows((rows,), mesh).addressable_devices_indices_map((rows,))
    return sorted({row for index in places.values() if index for row in range(rows)[index[0]]})


def _scatter(array: Any, place: NamedSharding) -> Array:
    values = np.asarray(array)
    return jax.make_array_from_callback(values.shape, place, lambda index: values[index])


def to_host(array: Any) -> np.ndarray:
    """The whole array in this process, wherever its parts lie; all processes of a run ask at once."""
    if getattr(array, "is_fully_addressable", True) or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))
