"""Packages that only some metrics need."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType


def load_package(name: str, metric: str) -> ModuleType:
    """Import a module of the extra `eval`.

    Raises:
        ValueError: It is not installed.
    """
    try:
        return import_module(name)
    except ImportError:
        raise ValueError(
            f"{metric} requires the eval extra: pip install 'paligemma-jax[eval]'"
        ) from None
