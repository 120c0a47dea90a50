"""Packages that only some metrics need."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType


def load_package(module: str, metric: str) -> ModuleType:
    """Import a module of a package in the extra `eval`.

    Raises:
        ValueError: The package is not installed.
    """
    try:
        return import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        raise ValueError(f"{metric} needs {package}: pip install 'paligemma-jax[eval]'") from None
