"""Dropout in the decoder, as in big_vision `models/ppp/gemma.py`, for training only.

As in flax's `nn.Dropout`, each number is zeroed by itself, and the others are divided by 1 - rate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

Block = Callable[..., tuple[Array, Any]]

_dropout: ContextVar[tuple[float, Array] | None] = ContextVar("dropout", default=None)
_layer_key: ContextVar[tuple[float, Array] | None] = ContextVar("layer_key", default=None)


@contextmanager
def decoder_dropout(rate: float, key: Array) -> Iterator[None]:
    """Apply dropout in every decoder that is traced inside. There is no dropout outside, so
    validation and inference need no switch.

    Args:
        rate: Probability of zeroing a number; with 0 the traced program has no dropout.
        key: Random key. Every layer derives its own from it.
    """
    token = _dropout.set((rate, key) if rate else None)
    try:
        yield
    finally:
        _dropout.reset(token)


def with_layer_keys(block: Block, depth: int) -> tuple[Block, tuple[Array, ...]]:
    """A block for `scan_layers` whose `dropout` has the key of the layer, and the keys of all
    layers, its last per-layer argument; without dropout, the same block and no keys."""
    active = _dropout.get()
    if active is None:
        return block, ()
    rate, key = active

    def keyed(layer: Any, x: Array, *values: Any) -> tuple[Array, Any]:
        token = _layer_key.set((rate, values[-1]))
        try:
            return block(layer, x, *values[:-1])
        finally:
            _layer_key.reset(token)

    return keyed, (jax.random.split(key, depth),)


def dropout(x: Array, branch: int) -> Array:
    """Drop numbers of a branch of a layer, inside `decoder_dropout`; return `x` elsewhere.

    Args:
        branch: Distinguishes the branches of a layer.
    """
    active = _layer_key.get()
    if active is None:
        return x
    rate, key = active
    keep = jax.random.bernoulli(jax.random.fold_in(key, branch), 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), 0)
