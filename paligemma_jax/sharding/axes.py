"""The mesh axes that the library knows, and meshes of other axes."""

from __future__ import annotations

import math
from collections.abc import Mapping

from jax.sharding import AxisType, Mesh

MESH_AXES = ("data", "fsdp", "tensor")


def rename_axes(mesh: Mesh, axes: Mapping[str, str]) -> Mesh:
    """Return a mesh of the same devices whose axes are named "data", "fsdp" or "tensor".

    Arrays on either mesh can be arguments of one program if the axes of `mesh` are
    `AxisType.Auto`.

    Args:
        mesh: A mesh with axes of any names and any axis types.
        axes: The new name of each axis, as in {"batch": "data", "model": "tensor"}. Axes that keep
            their name may be left out. Axes of one new name are merged, the first the slowest.

    Raises:
        ValueError: The names do not cover the mesh, or are not those of the library.
    """
    unknown = sorted(axes.keys() - {*mesh.axis_names})
    if unknown:
        raise ValueError(
            f"axes must name axes of the mesh ({', '.join(mesh.axis_names)}), "
            f"got {', '.join(map(repr, unknown))}"
        )
    names = [axes.get(axis, axis) for axis in mesh.axis_names]
    if not {*names} <= {*MESH_AXES}:
        raise ValueError(
            f"axes must rename every axis to one of {', '.join(MESH_AXES)}, "
            f"got {dict(zip(mesh.axis_names, names, strict=True))}"
        )
    kept = list(dict.fromkeys(names))
    order = sorted(range(len(names)), key=lambda i: kept.index(names[i]))
    sizes = [
        math.prod(size for size, name in zip(mesh.devices.shape, names, strict=True) if name == new)
        for new in kept
    ]
    devices = mesh.devices.transpose(order).reshape(sizes)
    return Mesh(devices, kept, axis_types=(AxisType.Auto,) * len(kept))


def checked_mesh(mesh: Mesh) -> Mesh:
    """Return a mesh with `AxisType.Auto` axes, which may be `Explicit` in the argument.

    Raises:
        ValueError: It is not a mesh, or its axes have other names.
    """
    if not isinstance(mesh, Mesh):
        raise ValueError(
            f"mesh must be a jax.sharding.Mesh, got {mesh!r}: paligemma_jax.sharding.mesh has "
            "resolve_mesh(text, model.config) and make_mesh(data=..., fsdp=..., tensor=...)"
        )
    unknown = [axis for axis in mesh.axis_names if axis not in MESH_AXES]
    if unknown:
        free = [axis for axis in ("data", "tensor", "fsdp") if axis not in mesh.axis_names]
        renamed = dict.fromkeys(unknown, "data") | dict(zip(unknown, free, strict=False))
        raise ValueError(
            f"mesh axes must be among {', '.join(MESH_AXES)}, got {', '.join(mesh.axis_names)}: "
            f"rename them with paligemma_jax.sharding.axes.rename_axes(mesh, {renamed})"
        )
    return rename_axes(mesh, {})
