"""Services that a run logs to, besides log.jsonl."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol
from uuid import uuid4

PROJECT = "paligemma-jax"  # the project of a run in wandb and trackio
# (package to import, how to install it)
PACKAGES = {
    "tensorboard": ("tensorboardX", "the train extra: pip install 'paligemma-jax[train]'"),
    "wandb": ("wandb", "the package wandb: pip install wandb"),
    "trackio": ("trackio", "the package trackio: pip install trackio"),
}


class Logger(Protocol):
    """Receives the numbers of each step."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Writes event files to tensorboard/ in the directory of the run."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]):
        self.writer = load_package("tensorboard").SummaryWriter(str(folder / "tensorboard"))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class Tracker:
    """Logs to wandb, or to trackio, whose functions have the same names. A run that resumes
    continues its record there."""

    def __init__(self, name: str, folder: Path, settings: Mapping[str, Any]):
        self.module = load_package(name)
        options = {"id": _record_id(folder), "dir": str(folder)} if name == "wandb" else {}
        self.module.init(
            project=PROJECT,
            name=folder.resolve().name,
            config=dict(settings),
            resume="allow",
            **options,
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.module.log(dict(values), step=step)

    def close(self) -> None:
        self.module.finish()


def _wandb(folder: Path, settings: Mapping[str, Any]) -> Logger:
    return Tracker("wandb", folder, settings)


def _trackio(folder: Path, settings: Mapping[str, Any]) -> Logger:
    return Tracker("trackio", folder, settings)


# (directory of the run, its settings) -> logger
LOGGERS: dict[str, Callable[[Path, Mapping[str, Any]], Logger]] = {
    "tensorboard": TensorBoard,
    "wandb": _wandb,
    "trackio": _trackio,
}


def load_package(name: str) -> ModuleType:
    """Import the package of a logger.

    Raises:
        ValueError: It is not installed.
    """
    package, source = PACKAGES[name]
    try:
        return import_module(package)
    except ImportError:
        raise ValueError(f"--log {name} requires {source}") from None


def _record_id(folder: Path) -> str:
    """The id of the run's record, kept in its directory so that it continues there."""
    file = folder / "wandb-id"
    if not file.exists():
        file.write_text(uuid4().hex)
    return file.read_text()
