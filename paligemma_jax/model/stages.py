"""Look inside a forward pass: every intermediate result has a name, and can be replaced.

Used by `Predictor.stages` and by the parity report. State is one context variable: a
`collect_stages` block sees the stages of the model calls that are traced inside it, so under
`jax.jit` the complete block belongs inside the traced function.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import wraps
from types import MappingProxyType
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

Sublayer = TypeVar("Sublayer", bound=Callable)


@dataclass(frozen=True)
class _Collection:
    attention: bool
    branches: bool
    fed: Mapping[str, Array | np.ndarray]
    stages: dict[str, Array] = field(default_factory=OrderedDict)  # jit sorts the keys of a dict


_collection: ContextVar[_Collection | None] = ContextVar("collection", default=None)
_prefix: ContextVar[str] = ContextVar("prefix", default="")


@contextmanager
def collect_stages(
    attention: bool = False,
    branches: bool = False,
    fed: Mapping[str, Array | np.ndarray] = MappingProxyType({}),
) -> Iterator[dict[str, Array]]:
    """Collect the stages of the model calls traced inside, by name, in order of computation.

    Args:
        attention: Also collect attention weights. Queries then run in one chunk.
        branches: Also collect what each block adds to the residual stream:
            layers/0/attention/output and layers/0/mlp/output.
        fed: Values by stage name with which the model continues in place of its own. The model's
            own value is still collected, so each stage shows the error made since the last fed one.
    """
    collection = _Collection(attention, branches, fed)
    token, prefix = _collection.set(collection), _prefix.set("")
    try:
        yield collection.stages
    finally:
        _collection.reset(token)
        _prefix.reset(prefix)


def collecting() -> bool:
    """Whether this trace is inside a `collect_stages` block."""
    return _collection.get() is not None


def collecting_attention() -> bool:
    """Whether this trace collects attention weights."""
    collection = _collection.get()
    return collection is not None and collection.attention


def stage(name: str, value: Array, branch: bool = False) -> Array:
    """Name an intermediate result. Returns `value`, or the value fed in its place."""
    collection = _collection.get()
    if collection is None or (branch and not collection.branches):
        return value
    name = f"{_prefix.get()}/{name}".strip("/")
    collection.stages[name] = value
    return jnp.asarray(collection.fed[name], value.dtype) if name in collection.fed else value


@contextmanager
def scope(name: str) -> Iterator[None]:
    """Prefix the stages named inside, and the operations in a profile."""
    token = _prefix.set(f"{_prefix.get()}/{name}".strip("/"))
    try:
        with jax.named_scope(name):
            yield
    finally:
        _prefix.reset(token)


def branch(name: str) -> Callable[[Sublayer], Sublayer]:
    """Decorate a block's method that returns what is added to the residual stream, alone or as the
    first of a tuple: it runs in the scope `name`, and its result is the stage `name`/output."""

    def decorate(sublayer: Sublayer) -> Sublayer:
        @wraps(sublayer)
        def wrapped(*args):
            with scope(name):
                y = sublayer(*args)
                first, *rest = y if isinstance(y, tuple) else (y,)
                first = stage("output", first, branch=True)
                return (first, *rest) if rest else first

        return wrapped  # type: ignore[return-value]

    return decorate
