"""."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
from jax import Array
from jax.sharding import Mesh

from paligemma_jax.model.constrain import constrain_with
from paligemma_jax.sharding.mesh import mesh_of
from paligemma_jax.sharding.rules import partition_spec, partition_specs


@contextmanager
def use_mesh(mesh: Mesh | None) -> Iterator[None]:
    """What is traced inside is for this mesh: `place` is heard. None changes nothing."""
    if mesh is None:
        yield
        return
    with jax.set_mesh(mesh), constrain_with(_place):
        yield


def _place(axes: str, x: Array) -> Array:
    return jax.lax.with_sharding_constraint(x, partition_spec(axes.split(), x.shape, jax.sharding.get_abstract_mesh()))


def constrain_tree(tree: Any) -> Any:
    """In what is traced for a mesh: the arrays of a tree where `partitions` says; elsewhere nothing."""
    mesh = jax.sharding.get_abstract_mesh()
    return tree if mesh.empty else jax.lax.with_sharding_constraint(tree, partition_specs(tree, mesh))


class mesh_jit:
    """`jax.jit`, traced for the mesh where the first argument lies, and run there."""

    def __init__(self, function: Callable, **options: Any):
        self.program: Any = jax.jit(function, **options)
        functools.update_wrapper(self, function)

    def __call__(self, first: Any, *rest: Any, **named: Any) -> Any:
        with use_mesh(mesh_of(first)):
            return self.program(first, *rest, **named)

    def lower(self, first: Any, *rest: Any, **named: Any) -> Any:
        with use_mesh(mesh_of(first)):
            return self.program.lower(first, *rest, **named)

    def _cache_size(self) -> int:
        return self.program._cache_size()
