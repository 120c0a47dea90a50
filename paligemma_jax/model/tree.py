"""Models as trees: parameters by path, and modules replaced by path."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
from flax import nnx
from jaxtyping import PyTree

Model = TypeVar("Model")
Leaf = Any  # an array, a jax.ShapeDtypeStruct, a sharding, ...: whatever the tree contains


def parameters(model: PyTree) -> dict[str, Leaf]:
    """Every parameter by its path, as in "decoder/layers/3/attention/q/kernel"."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(model)
    return {_path(path): leaf for path, leaf in leaves}


def with_parameters(model: Model, value: Callable[[str], Leaf]) -> Model:
    """The same model with `value(path)` in place of every parameter."""
    return jax.tree_util.tree_map_with_path(lambda path, _: value(_path(path)), model)


def copy_tree(model: Model) -> Model:
    """A copy of the modules around the same arrays."""
    return jax.tree.map(lambda leaf: leaf, model)


def replace_modules(model: Model, make: Callable[[str, nnx.Module], nnx.Module | None]) -> Model:
    """Return a copy of the model with each module replaced by `make(path, module)`, unless that is
    None. Replaced modules are not searched further; arrays are shared with the original."""

    def visit(module: nnx.Module, path: str) -> None:
        is_list = isinstance(module, nnx.List)
        for name, child in list(enumerate(module) if is_list else vars(module).items()):
            if not isinstance(child, nnx.Module):
                continue
            replacement = make(f"{path}{name}", child)
            if replacement is None:
                visit(child, f"{path}{name}/")
            elif is_list:
                module[name] = replacement  # type: ignore[index]
            else:
                setattr(module, str(name), replacement)

    model = copy_tree(model)
    visit(model, "")  # type: ignore[arg-type]
    return model


def modules(model: PyTree, kind: type | tuple[type, ...]) -> dict[str, Any]:
    """Every module of these types by its path. Modules inside such a module are not listed."""
    by_path: dict[str, Any] = {}

    def visit(path: str, module: nnx.Module) -> nnx.Module | None:
        if not isinstance(module, kind):
            return None
        by_path[path] = module
        return module  # unchanged, and not searched further

    replace_modules(model, visit)
    return by_path


def _path(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")
