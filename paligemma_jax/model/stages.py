"""Look inside a forward pass: every intermediate result has a name, and can be replaced.

Besides dropout in training, this is the only place where a context variable changes what a model
computes: the innermost `collect_stages` block. `Predictor.stages` and the parity report use it. A
block works where the model is called, eagerly or within one traced function:

    @jax.jit
    def patched(model, inputs, fed):
        with collect_stages(fed=fed) as stages:
            model(inputs.tokens, inputs.images, inputs.valid, inputs.prefix)
        return stages

A block never reaches into another trace, so no compiled program can keep or miss an intervention:

- A model that `jax.jit`, `scan`, `grad` or `vmap` traces inside the block raises an error.
- A function compiled earlier does not see the block. The block then ends without stages, or
  without the names to replace, and raises an error.
- The compiled programs of this library, such as those of `Predictor.generate`, refuse to run
  inside a block (`sharding/compiled.py`).

Layers stacked for `jax.lax.scan` run one by one inside a block, so that each has its own names.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import wraps
from types import MappingProxyType
from typing import Literal, TypeVar

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
from jax import Array

from paligemma_jax.model.edits import NO_EDITS, Edits

Fed = Mapping[str, Array | np.ndarray]
Kind = Literal["main", "branch", "attention", "detail"]
Sublayer = TypeVar("Sublayer", bound=Callable)


@dataclass(frozen=True)
class _Collection:
    kinds: frozenset[Kind]
    only: tuple[str, ...] | None
    fed: Fed
    edits: Edits
    trace: object = field(default_factory=lambda: jax.extend.core.get_opaque_trace_state())
    reached: set[str] = field(default_factory=set)  # all names, collected or not
    stages: dict[str, Array] = field(default_factory=OrderedDict)  # jit sorts the keys of a dict

    def collects(self, name: str, kind: Kind) -> bool:
        if name in self.fed:
            return True
        if self.only is None:
            return kind in self.kinds
        return any(re.fullmatch(pattern, name) for pattern in self.only)

    def concerns(self, name: str, kind: Kind) -> bool:
        return self.collects(name, kind) or self.edits.concern(name)

    def check_all_fed(self) -> None:
        if not self.reached:
            raise ValueError(
                "a collect_stages block must call the model, got no stage: put the block inside "
                "the function that is compiled, around the call of the model"
            )
        for name in self.fed.keys() - self.reached:
            near = get_close_matches(name, sorted(self.reached)) or list(self.stages)[:3]
            raise ValueError(
                f"fed must name stages that the block computes, got {name!r}; "
                f"near it: {', '.join(near)}"
            )


_collection: ContextVar[_Collection | None] = ContextVar("collection", default=None)
_prefix: ContextVar[str] = ContextVar("prefix", default="")


@contextmanager
def collect_stages(
    attention: bool = False,
    branches: bool = False,
    fed: Fed = MappingProxyType({}),
    only: Sequence[str] | None = None,
    edits: Edits = NO_EDITS,
) -> Iterator[dict[str, Array]]:
    """Collect the stages of one model call, by name, in order of computation.

    Args:
        attention: Also collect attention weights: decoder/layers/0/attention/weights
            [B, N, T, S]. Queries then run in one chunk.
        branches: Also collect what each block adds to the residual stream:
            decoder/layers/0/attention/output and decoder/layers/0/mlp/output.
        fed: Values by stage name, of any kind, with which the model continues in place of its own.
            They are cast to the stage's dtype. The model's own value is still collected, so each
            stage shows the error made since the last fed one.
        only: Collect the stages of these names, or whose names match these regular expressions,
            and no others. Every stage can be named, also
            attention/q, k, v (before rope), scores (after the softcap, before the mask) and heads
            (results of each head), and mlp/activations.
        edits: Changes of stages. The value before the change is collected.

    Raises:
        ValueError: While the model runs, if a fed value or an edit does not fit its stage, a stage
            is computed twice, or a transformation inside the block traces the model. At the end of
            the block, if a fed name was not computed, or nothing was.
    """
    kinds: dict[Kind, bool] = {"main": True, "branch": branches, "attention": attention}
    chosen: frozenset[Kind] = frozenset(kind for kind, wanted in kinds.items() if wanted)
    collection = _Collection(chosen, None if only is None else tuple(only), fed, edits)
    token, prefix = _collection.set(collection), _prefix.set("")
    try:
        yield collection.stages
    finally:
        _collection.reset(token)
        _prefix.reset(prefix)
    collection.check_all_fed()


@contextmanager
def editing(edits: Edits) -> Iterator[None]:
    """Change stages of the model call inside. Without edits, a model runs as it does elsewhere."""
    if not edits.order:
        yield
        return
    with collect_stages(only=(), edits=edits):
        yield


def collecting() -> bool:
    """Whether this trace is inside a `collect_stages` block."""
    return _collection.get() is not None


def collecting_scores() -> bool:
    """Whether scores or weights of attention in this scope are collected, fed or edited."""
    collection = _collection.get()
    return collection is not None and (
        collection.concerns(_scoped("weights"), "attention")
        or collection.concerns(_scoped("scores"), "detail")
    )


def stage(name: str, value: Array, kind: Kind = "main") -> Array:
    """Name an intermediate result. Returns `value`, or what is fed or edited in its place.

    Args:
        kind: "main" is always collected, "branch" and "attention" with the options `branches` and
            `attention`, and "detail" only by name.
    """
    collection = _collection.get()
    if collection is None:
        return value
    name = _scoped(name)
    collection.reached.add(name)
    if not collection.concerns(name, kind):
        return value
    if jax.extend.core.get_opaque_trace_state() != collection.trace:
        raise ValueError(
            f"a collect_stages block must be inside the function that jax traces, but {name} is "
            "traced by jit, scan, grad or vmap inside the block: move the complete block into it"
        )
    if name in collection.stages:
        raise ValueError(
            f"a collect_stages block must call the model once, but {name} is computed twice: "
            "use one block per call"
        )
    if collection.collects(name, kind):
        collection.stages[name] = value
    if name in collection.fed:
        fed = collection.fed[name]
        if np.shape(fed) != value.shape:
            raise ValueError(
                f"the value fed for {name} must be {list(value.shape)}, got {list(np.shape(fed))}"
            )
        value = jnp.asarray(fed, value.dtype)
    return collection.edits.apply(name, value)


def _scoped(name: str) -> str:
    return f"{_prefix.get()}/{name}".strip("/")


@contextmanager
def scope(name: str) -> Iterator[None]:
    """Prefix the stages named inside, and the operations in a profile."""
    token = _prefix.set(_scoped(name))
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
                first = stage("output", first, "branch")
                return (first, *rest) if rest else first

        return wrapped  # type: ignore[return-value]

    return decorate
