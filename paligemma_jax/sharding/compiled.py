"""Trace and run functions on the mesh of their arguments."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, ParamSpec, TypeVar

import jax
from jax import Array
from jax.sharding import AxisType, Mesh, PartitionSpec
from jaxtyping import PyTree

from paligemma_jax.model.constrain import Placement, constrain_with
from paligemma_jax.model.stages import collecting
from paligemma_jax.sharding.mesh import mesh_of
from paligemma_jax.sharding.rules import partition_spec, partition_specs

P = ParamSpec("P")
R = TypeVar("R")


@contextmanager
def use_mesh(mesh: Mesh | None) -> Iterator[None]:
    """Trace for a mesh inside: the model's `constrain` takes effect. None changes nothing.

    Raises:
        ValueError: Its axes are not `AxisType.Auto`.
    """
    if mesh is None:
        yield
        return
    if {*mesh.axis_types} != {AxisType.Auto}:
        raise ValueError(
            f"mesh axes must be AxisType.Auto to compile a program, got {mesh}: place the model "
            "with paligemma_jax.sharding.arrays.distribute(model, mesh), and use mesh_of(model)"
        )
    with jax.set_mesh(mesh), constrain_with(MeshPlacement()):
        yield


class MeshPlacement(Placement):
    """The placement of arrays on the mesh that is set (`sharding/rules.py`)."""

    def constrain(self, axes: str, x: Array) -> Array:
        return jax.lax.with_sharding_constraint(x, _spec(axes, x))

    def ways(self, letter: str, size: int) -> int:
        mesh = jax.sharding.get_abstract_mesh()
        names = jax.tree.leaves(tuple(partition_spec([letter], [size], mesh)))
        return math.prod(mesh.shape[name] for name in names)

    def over_shards(
        self, function: Callable[..., Array], axes: Sequence[str], arrays: Sequence[PyTree]
    ) -> Array:
        specs = tuple(
            jax.tree.map(partial(_spec, letters), tree)
            for letters, tree in zip(axes, arrays, strict=True)
        )
        mapped = jax.shard_map(function, in_specs=specs, out_specs=specs[0], check_vma=False)
        return mapped(*arrays)


def _spec(axes: str, x: Array) -> PartitionSpec:
    return partition_spec(axes.split(), x.shape, jax.sharding.get_abstract_mesh())


def constrain_tree(tree: PyTree) -> PyTree:
    """Constrain the arrays of a tree to their `partition_specs`, if traced for a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return tree
    return jax.lax.with_sharding_constraint(tree, partition_specs(tree, mesh))


class Structure:
    """The structure of a pytree, whose hash is computed once."""

    def __init__(self, treedef: Any):
        self.treedef, self.hash = treedef, hash(treedef)

    def __hash__(self) -> int:
        return self.hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Structure) and self.treedef == other.treedef)


@jax.tree_util.register_pytree_node_class
@dataclass(frozen=True)
class Flattened:
    """A model in the form in which programs take it, as the first argument of a `mesh_jit`.

    To flatten an `nnx.Module` takes milliseconds, for each call. The model must not be changed.
    """

    leaves: Sequence[Array]
    structure: Structure

    @classmethod
    def of(cls, model: PyTree) -> Flattened:
        leaves, treedef = jax.tree.flatten(model)
        return cls(leaves, Structure(treedef))

    def tree_flatten(self) -> tuple[Sequence[Array], Structure]:
        return self.leaves, self.structure

    @classmethod
    def tree_unflatten(cls, structure: Structure, leaves: Sequence[Array]) -> Flattened:
        return cls(leaves, structure)

    def restore(self) -> PyTree:
        return jax.tree.unflatten(self.structure.treedef, self.leaves)


class mesh_jit(Generic[P, R]):
    """`jax.jit` that traces and runs a function on the mesh of its first argument, a pytree or a
    `Flattened` one."""

    def __init__(self, function: Callable[P, R], **options: object):
        @functools.wraps(function)
        def traced(first: PyTree, *args: object, **kwargs: object) -> R:
            first = first.restore() if isinstance(first, Flattened) else first
            return function(first, *args, **kwargs)  # type: ignore[call-arg]

        self.jitted = jax.jit(traced, **options)  # type: ignore[call-overload]
        functools.update_wrapper(self, function)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        if collecting():
            raise ValueError(
                "a collect_stages block must call the model itself, but "
                f"{self.__name__} is a compiled program and would not see the block: "  # type: ignore[attr-defined]
                "call model(...) inside it; to change what is generated, change the model"
            )
        with use_mesh(mesh_of(args[0])):
            return self.jitted(*args, **kwargs)

    def lower(self, *args: P.args, **kwargs: P.kwargs) -> jax.stages.Lowered:
        with use_mesh(mesh_of(args[0])):
            return self.jitted.lower(*args, **kwargs)

    def _cache_size(self) -> int:
        return self.jitted._cache_size()  # type: ignore[attr-defined]
