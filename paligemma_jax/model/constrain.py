"""The model's only reference to devices: `constrain` names the axes of an array.

Modules do not depend on a mesh. Code that runs them on one gives the names a meaning with
`constrain_with` (`sharding/compiled.py`); otherwise `constrain` returns its argument, and
`over_shards` calls its function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import TypeVar

from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import PyTree

Sublayer = TypeVar("Sublayer", bound=Callable)


class Placement:
    """What the letters of axes mean: on one device, nothing."""

    def constrain(self, axes: str, x: Array) -> Array:
        return x

    def ways(self, letter: str, size: int) -> int:
        return 1

    def over_shards(
        self, function: Callable[..., Array], axes: Sequence[str], arrays: Sequence[PyTree]
    ) -> Array:
        return function(*arrays)


ONE_DEVICE = Placement()
_placement: ContextVar[Placement] = ContextVar("placement", default=ONE_DEVICE)


def constrain(axes: str, x: Array) -> Array:
    """Return `x`, placed on devices by the letters of its first axes, as in "B T D" (`layers.py`).

    "-" is an axis that is not split. B and T also stand for the images and patches of the vision
    tower (M and P).
    """
    return _placement.get().constrain(axes, x)


def ways(letter: str, size: int) -> int:
    """Return the number of slices that an axis of this letter and size is split into."""
    return _placement.get().ways(letter, size)


def over_shards(
    function: Callable[..., Array], axes: Sequence[str], *arrays: PyTree[Array]
) -> Array:
    """Return function(*arrays), computed by each device for its part of the arrays.

    For kernels, which the compiler cannot split. The result is placed as the first array.

    Args:
        axes: For each argument, the letters of the first axes of its arrays, as for `constrain`.
    """
    return _placement.get().over_shards(function, axes, arrays)


@contextmanager
def constrain_with(placement: Placement) -> Iterator[None]:
    """Give the axes of every `constrain` and `over_shards` that is traced inside a meaning."""
    token = _placement.set(placement)
    try:
        yield
    finally:
        _placement.reset(token)


def gather_weight(axes: str, weight: Array) -> Array:
    """Gather a weight whose axis D or W is split (fully sharded data parallelism), as one array.

    Left to itself, the TPU compiler multiplies by one slice after another and adds up the
    products in memory. Both layouts are constrained, so that a cast before this call happens
    before the gather, and the gradient is scattered again.
    """
    whole = axes.replace("D", "-").replace("W", "-")
    return constrain(" ".join(whole), constrain(" ".join(axes), weight))


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

    The output is named for rematerialization (`stack.py`).
    """

    def scatter(y: Array) -> Array:
        return checkpoint_name(scatter_tokens(y), "sublayer")

    @wraps(sublayer)
    def wrapped(self, x: Array, *rest):
        y = sublayer(self, gather_tokens(x), *rest)
        return (scatter(y[0]), *y[1:]) if isinstance(y, tuple) else scatter(y)

    return wrapped  # type: ignore[return-value]
