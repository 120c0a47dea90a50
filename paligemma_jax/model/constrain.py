"""The model's only reference to devices: `constrain` names the axes of an array.

Modules do not depend on a mesh. Code that runs them on one gives the names a meaning with
`constrain_with` (`sharding/compiled.py`); otherwise `constrain` returns its argument.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import TypeVar

from jax import Array

Constraint = Callable[[str, Array], Array]
Sublayer = TypeVar("Sublayer", bound=Callable)

_constraint: ContextVar[Constraint | None] = ContextVar("constraint", default=None)


def constrain(axes: str, x: Array) -> Array:
    """Return `x`, placed on devices by the letters of its first axes, as in "B T D" (`layers.py`).

    "-" is an axis that is not split. B and T also stand for the images and patches of the vision
    tower (M and P).
    """
    constraint = _constraint.get()
    return x if constraint is None else constraint(axes, x)


@contextmanager
def constrain_with(constraint: Constraint | None) -> Iterator[None]:
    """Apply `constraint(axes, x)` to every `constrain` that is traced inside."""
    token = _constraint.set(constraint)
    try:
        yield
    finally:
        _constraint.reset(token)


def gather_tokens(x: Array) -> Array:
    """Gather [B, T, D], split by tokens, into complete sequences. Both layouts are constrained, so
    that the gradient is scattered again."""
    return constrain("B", constrain("B T", x))


def scatter_tokens(x: Array) -> Array:
    """The inverse of `gather_tokens`."""
    return constrain("B T", constrain("B", x))


def over_all_tokens(sublayer: Sublayer) -> Sublayer:
    """Decorate a method (x, ...) -> y or (y, ...) that needs complete sequences: its input is
    gathered, its output scattered again, so that norms and residuals run on each device's own
    tokens (sequence parallelism, arXiv:2205.05198).
    """

    @wraps(sublayer)
    def wrapped(self, x: Array, *rest):
        y = sublayer(self, gather_tokens(x), *rest)
        return (scatter_tokens(y[0]), *y[1:]) if isinstance(y, tuple) else scatter_tokens(y)

    return wrapped  # type: ignore[return-value]
