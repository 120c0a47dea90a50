"""Make and parse meshes, and compute the batch sizes that they divide."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jaxtyping import PyTree

from paligemma_jax.model.config import PaliGemmaConfig
from paligemma_jax.sharding.axes import MESH_AXES, checked_mesh
from paligemma_jax.sharding.rules import AXIS_RULES

Devices = Sequence[jax.Device]  # type: ignore[valid-type]  # jax defines it as a variable


def make_mesh(
    data: int = 1, fsdp: int = 1, tensor: int = 1, devices: Devices | None = None
) -> Mesh:
    """Return a mesh of the first data * fsdp * tensor devices.

    Raises:
        ValueError: There are fewer devices.
    """
    devices = devices or jax.devices()
    sizes = (data, fsdp, tensor)
    count = math.prod(sizes)
    if count > len(devices):
        raise ValueError(
            f"a mesh of {data} x {fsdp} x {tensor} needs {count} devices, got {len(devices)}"
        )
    types = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(sizes, MESH_AXES, axis_types=types, devices=devices[:count])


def resolve_mesh(
    mesh: str | Mesh | None,
    config: PaliGemmaConfig,
    training: bool = False,
    devices: Devices | None = None,
    rows: int = 0,
) -> Mesh | None:
    """Return the mesh that a string describes, such as "data=2,fsdp=4,tensor=2" or "auto".

    "auto" for training uses as many devices for `fsdp` as divide the batch, and the rest for
    `tensor`. For inference it uses as many for `tensor` as divide the key heads, so that no weights
    are gathered and each device stores the cache of its own heads, and the rest for `data`. A
    single key head (PaliGemma 1) is replicated and the query heads are split.

    Args:
        mesh: Axis sizes, 1 if left out; "auto"; a `Mesh` with axes of these names (`rename_axes`
            renames others), whose axes become `AxisType.Auto`; or None, for no mesh.
        devices: Devices to use; by default those of all processes for training, and those of this
            process for inference, where each process answers on its own.
        rows: The batch size for "auto" in training; 0 puts all devices on `fsdp`.

    Raises:
        ValueError: The string or the axes are not of this form, or there are fewer devices.
    """
    if mesh is None:
        return None
    if isinstance(mesh, Mesh):
        return checked_mesh(mesh)
    if not isinstance(mesh, str):
        raise ValueError(
            f"mesh must be auto, sizes like data=2,fsdp=4 (axes {', '.join(MESH_AXES)}), "
            f"a jax.sharding.Mesh or None, got {mesh!r}"
        )
    devices = devices or (jax.devices() if training else jax.local_devices())
    count = len(devices)
    if mesh != "auto":
        return make_mesh(**_parse_sizes(mesh), devices=devices)
    if training:
        fsdp = math.gcd(count, rows)
        return make_mesh(fsdp=fsdp, tensor=count // fsdp, devices=devices)
    heads = config.decoder.num_key_value_heads
    tensor = math.gcd(count, heads if heads > 1 else config.decoder.num_attention_heads)
    return make_mesh(data=count // tensor, tensor=tensor, devices=devices)


def _parse_sizes(mesh: str) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for part in mesh.split(","):
        axis, _, size = part.strip().partition("=")
        if axis not in MESH_AXES or axis in sizes or not size.isdecimal() or int(size) < 1:
            raise ValueError(
                f"mesh must be auto or sizes like data=2,fsdp=4 (axes {', '.join(MESH_AXES)}), "
                f"got {part!r} in {mesh!r}"
            )
        sizes[axis] = int(size)
    return sizes


def mesh_of(tree: PyTree) -> Mesh | None:
    """Return the mesh of a tree of arrays or shapes; None if they are on one device."""
    sharding = getattr(next(iter(jax.tree.leaves(tree)), None), "sharding", None)
    if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh):
        return sharding.mesh
    return None


def batch_shards(mesh: Mesh | None) -> int:
    """Return how many slices the rows of a batch are split into."""
    return math.prod(mesh.shape.get(axis, 1) for axis in AXIS_RULES["B"]) if mesh else 1


def padded_batch_size(rows: int, mesh: Mesh | None) -> int:
    """Return the size to pad a batch of `rows` to: a power of two per shard, so that few programs
    are compiled."""
    shards = batch_shards(mesh)
    return shards << (-(-rows // shards) - 1).bit_length()


def check_batch_size(flag: str, rows: int, parts: int, mesh: Mesh | None) -> None:
    """Raise ValueError unless the mesh divides a batch and each of its `parts`. Otherwise every
    device would compute all rows."""
    shards = batch_shards(mesh)
    if rows % (parts * shards):
        accumulate = f"--accumulate {parts} x " if parts > 1 else ""
        raise ValueError(
            f"{flag} must be a multiple of {parts * shards} ({accumulate}data x fsdp = {shards}), "
            f"got {rows}; or choose another --mesh"
        )
