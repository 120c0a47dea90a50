"""Where every array lies on a mesh: path -> axis letters -> mesh axes. The only file that knows a mesh."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding

from paligemma_jax.model.config import PaliGemmaConfig
from paligemma_jax.sharding.rules import AXES, MESH_AXES


def make_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of data * fsdp * tensor devices. ValueError if there are not that many."""
    sizes, have = (data, fsdp, tensor), len(devices or jax.devices())
    if math.prod(sizes) > have:
        raise ValueError(f"a mesh of {' x '.join(map(str, sizes))} needs {math.prod(sizes)} devices; there are {have}")
    chosen = (devices or jax.devices())[: math.prod(sizes)]
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3, devices=chosen)


def resolve_mesh(
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
























def batch_shards(mesh: Mesh | None) -> int:
    """Into how many slices of equal size the rows of a batch are cut; what they do not divide lies whole on every device."""
    return math.prod(mesh.shape.get(axis, 1) for axis in MESH_AXES["B"]) if mesh else 1


def padded_batch_size(rows: int, mesh: Mesh | None) -> int:
    """Rows of the batch in which so many are answered: a power of two, for few compiled programs, for each of the slices."""
    ways = batch_shards(mesh)
    return ways << (-(-rows // ways) - 1).bit_length()


def check_batch_size(flag: str, rows: int, parts: int, mesh: Mesh | None) -> None:
    """ValueError where every device would compute all rows of each of a batch's parts."""
    if rows % (parts * (ways := batch_shards(mesh))):
        each = f" in {parts} parts" if parts > 1 else ""
        raise ValueError(f"{flag} {rows}{each} does not divide over data x fsdp = {ways}: give a multiple of {parts * ways}, or another --mesh")








def mesh_of(tree: Any) -> Mesh | None:
    """The mesh on which a tree of arrays, or of `shapes`, lies; None where it is on one device."""
    sharding = getattr(next(iter(jax.tree.leaves(tree)), None), "sharding", None)
    return sharding.mesh if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh) else None








