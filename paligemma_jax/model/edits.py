"""Changes of intermediate results, as values that a compiled program takes as an argument."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, PyTree

# What happens to a stage: an array takes its place; a function of its value changes it.
Change: TypeAlias = Array | np.ndarray | Callable[[Array], Array]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Add:
    """Add what broadcasts to the stage, such as a direction float[D] to steer along."""

    vector: Float[Array | np.ndarray, "..."]

    def __call__(self, x: Array) -> Array:
        return x + jnp.asarray(self.vector, x.dtype)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Scale:
    """Multiply by a factor; 0 ablates."""

    factor: float | Array

    def __call__(self, x: Array) -> Array:
        return x * jnp.asarray(self.factor, x.dtype)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AblateHeads:
    """Set heads of an `attention/heads` stage [B, T, N, H] to zero."""

    heads: tuple[int, ...] = field(metadata=dict(static=True))

    def __call__(self, x: Array) -> Array:
        if not all(0 <= head < x.shape[-2] for head in self.heads):
            raise ValueError(f"heads must be from 0 to {x.shape[-2] - 1}, got {self.heads}")
        return x.at[..., list(self.heads), :].set(0)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Patch:
    """Put values, such as those of another run, where `where` is True."""

    value: Float[Array | np.ndarray, "..."]
    where: Bool[Array | np.ndarray, "..."]  # over the first axes of the stage, such as [B, T]

    def __call__(self, x: Array) -> Array:
        where = jnp.asarray(self.where)
        where = where.reshape(where.shape + (1,) * (x.ndim - where.ndim))
        return jnp.where(where, jnp.asarray(self.value, x.dtype), x)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Edits:
    """Changes by pattern of stage names, in the order in which they are applied.

    Arrays are arguments of the compiled program. Functions belong to it: it is compiled once for
    each function object, so define one outside of a loop rather than a lambda inside.
    """

    order: tuple[str, ...] = field(default=(), metadata=dict(static=True))
    functions: tuple[Callable[[Array], Array] | None, ...] = field(
        default=(), metadata=dict(static=True)
    )
    values: tuple[PyTree, ...] = ()

    @classmethod
    def of(cls, edit: Mapping[str, Change] | Edits | None) -> Edits:
        """Make edits from changes by name, or by regular expression for a complete name.

        Raises:
            ValueError: A pattern or a change is not of these kinds.
        """
        if isinstance(edit, Edits):
            return edit
        if not isinstance(edit, Mapping | None):
            raise ValueError(f"edit must be a dict from stage names to changes, got {edit!r}")
        functions, values = [], []
        for pattern, change in (edit or {}).items():
            check_pattern("edit", pattern)
            is_array = isinstance(change, Array | np.ndarray)
            if not is_array and not callable(change):
                raise ValueError(
                    f"the edit of {pattern} must be an array or a function of one, got {change!r}"
                )
            is_function = not is_array and jax.tree_util.all_leaves([change])
            functions.append(change if is_function else None)
            values.append(None if is_function else change)
        return cls(tuple(edit or ()), tuple(functions), tuple(values))

    def concern(self, name: str) -> bool:
        """Whether a stage of this name is changed."""
        return any(re.fullmatch(pattern, name) for pattern in self.order)

    def apply(self, name: str, x: Array) -> Array:
        """Return a stage's value after all changes, in its dtype.

        Raises:
            ValueError: A change does not fit the stage's shape.
        """
        for pattern, function, value in zip(self.order, self.functions, self.values, strict=True):
            if not re.fullmatch(pattern, name):
                continue
            try:
                changed = function(x) if function else _changed(value, x)
            except (TypeError, ValueError) as error:
                reason = str(error).splitlines()[0]
                raise ValueError(
                    f"the edit of {name} does not fit its shape {list(x.shape)}: {reason}"
                ) from error
            if jnp.shape(changed) != x.shape:
                raise ValueError(
                    f"the edit of {name} must return {list(x.shape)}, "
                    f"got {list(jnp.shape(changed))}"
                )
            x = jnp.asarray(changed, x.dtype)
        return x


NO_EDITS = Edits()


def _changed(change: PyTree, x: Array) -> Array:
    if callable(change):
        return change(x)  # type: ignore[return-value]
    return jnp.broadcast_to(jnp.asarray(change), x.shape)


def check_pattern(owner: str, pattern: object) -> None:
    """Raise ValueError unless it is a regular expression."""
    try:
        re.compile(pattern)  # type: ignore[call-overload]
    except (re.error, TypeError) as error:
        raise ValueError(
            f"{owner} must have stage names or regular expressions, got {pattern!r}: {error}"
        ) from None
