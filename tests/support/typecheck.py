"""The type checker that tests/conftest.py installs with jaxtyping's import hook."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import jax
import numpy as np
from beartype import beartype


def check(function: Callable) -> Callable:
    """beartype, except that a constructor is checked only if all leaves of its arguments are
    arrays.

    JAX rebuilds pytrees with other leaves as well: shapes, shardings, paths.
    """
    checked = beartype(function)
    if function.__name__ != "__init__":
        return checked

    @wraps(function)
    def init(*args: Any, **keywords: Any) -> None:
        leaves = jax.tree.leaves((args[1:], keywords))
        only_arrays = leaves and all(isinstance(leaf, jax.Array | np.ndarray) for leaf in leaves)
        (checked if only_arrays else function)(*args, **keywords)

    return init
