"""Several processes, on one or many hosts, that work as one (`jax.distributed`)."""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Literal, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

VARIABLE = "PALIGEMMA_JAX_HOSTS"
FORMAT = "HOST:PORT,COUNT,INDEX"


class ProcessAddress(NamedTuple):
    """The place of this process in a multi-process run."""

    coordinator: str  # HOST:PORT of process 0
    count: int
    index: int


def initialize(hosts: str | None) -> None:
    """Connect to the other processes of a run. Call it before any computation.

    Args:
        hosts: "auto" to detect a TPU pod, Slurm, Open MPI or Kubernetes; "HOST:PORT,COUNT,INDEX",
            where process 0 listens on HOST:PORT; or None for $PALIGEMMA_JAX_HOSTS. If that is not
            set either, this process runs alone.

    Raises:
        ValueError: `hosts` has another form, or "auto" detects nothing.
    """
    address = _parse(hosts)
    if address is None or jax.distributed.is_initialized():
        return
    if isinstance(address, ProcessAddress):
        jax.distributed.initialize(
            address.coordinator, address.count, address.index, cluster_detection_method="deactivate"
        )
        return
    try:
        jax.distributed.initialize()
    except ValueError as error:
        raise ValueError(
            f"--hosts auto detected no cluster ({error}); give {FORMAT} instead"
        ) from None


def process_part(hosts: str | None) -> tuple[int, int]:
    """Return (index, count) of this process among processes that work independently.

    A process that ends or is lost does not stop the others. `hosts` is as in `initialize`: an
    explicit HOST:PORT,COUNT,INDEX opens no connection; "auto" connects once to learn the numbers.
    """
    address = _parse(hosts)
    if isinstance(address, ProcessAddress):
        return address.index, address.count
    if address and not jax.distributed.is_initialized():
        return _detect_part()
    return jax.process_index(), jax.process_count()


@cache
def _detect_part() -> tuple[int, int]:
    initialize("auto")
    part = jax.process_index(), jax.process_count()
    jax.distributed.shutdown()
    return part


def _parse(hosts: str | None) -> ProcessAddress | Literal["auto"] | None:
    hosts = hosts or os.environ.get(VARIABLE) or None
    if hosts is None or hosts == "auto":
        return hosts
    match = re.fullmatch(r"([^,]+:\d+),(\d+),(\d+)", hosts)
    if not match or int(match[3]) >= int(match[2]):
        raise ValueError(
            f"--hosts must be auto or {FORMAT} with INDEX from 0 to COUNT - 1, "
            f"such as 10.0.0.1:1234,4,0; got {hosts!r}"
        )
    return ProcessAddress(match[1], int(match[2]), int(match[3]))


def is_first_process() -> bool:
    """Whether this process writes the files and messages of the run."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Wait until all processes reach the barrier of this name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def any_process(flag: bool) -> bool:
    """Return whether `flag` is true in any process."""
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(np.array(flag)).any())


@contextmanager
def exit_together() -> Iterator[None]:
    """Decorate the main function of a multi-process run, so that an error in one process ends all.

    The process exits at once instead of waiting for the others at exit. They lose their connection
    or, if a device waits without end, the heartbeat: JAX then ends them within 100 s.
    """
    try:
        yield
    except Exception as error:
        if jax.process_count() == 1:
            raise
        lost = isinstance(error, jax.errors.JaxRuntimeError)
        message = str(error)
        if lost:
            detail = message.splitlines()[0][:200] if message else ""
            message = (
                "another process of this run is lost; restart all of them with --resume to "
                f"continue from the last checkpoint ({detail})"
            )
        elif not isinstance(error, ValueError):
            traceback.print_exc()
        print(
            f"paligemma-jax: process {jax.process_index()}: {message}", file=sys.stderr, flush=True
        )
        os._exit(1 if lost else 2)
