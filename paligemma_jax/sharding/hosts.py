"""Several processes, on one or many hosts, that compute as one (`jax.distributed`): how they find each other, and how they end together."""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import jax
import numpy as np
from jax.experimental import multihost_utils

VARIABLE = "PALIGEMMA_JAX_HOSTS"


def initialize(hosts: str | None) -> None:
    """Joins the other processes of a run, before anything is computed; without `hosts` and $PALIGEMMA_JAX_HOSTS this process stays alone.

    hosts: "auto", where a TPU pod, Slurm, Open MPI or Kubernetes tells who there is; else "HOST:PORT,N,I": process I of N, of which the first
    listens on HOST:PORT. ValueError for anything else.
    """
    told = _told(hosts)
    if told is None or jax.distributed.is_initialized():
        return
    if isinstance(told, tuple):
        return jax.distributed.initialize(*told, cluster_detection_method="deactivate")
    try:
        jax.distributed.initialize()
    except ValueError as error:
        raise ValueError(f"hosts auto: nothing here tells who takes part ({error}); give HOST:PORT,N,I") from None


def process_part(hosts: str | None) -> tuple[int, int]:
    """(I, N): which of how many processes this is, for those that answer by themselves: one that ends, or is lost, ends no other.

    `hosts` as for `join`. HOST:PORT,N,I is taken at its word, without a connection; by auto all meet, learn their numbers, and take leave.
    """
    told = _told(hosts)
    if isinstance(told, tuple):
        return told[2], told[1]
    return _met() if told and not jax.distributed.is_initialized() else (jax.process_index(), jax.process_count())


@cache
def _met() -> tuple[int, int]:
    initialize("auto")
    found = jax.process_index(), jax.process_count()
    jax.distributed.shutdown()
    return found


def _told(hosts: str | None) -> str | tuple[str, int, int] | None:
    """auto, or the first process's address, N and I."""
    hosts = hosts or os.environ.get(VARIABLE)
    if not hosts or hosts == "auto":
        return hosts or None
    told = re.fullmatch(r"([^,]+:\d+),(\d+),(\d+)", hosts)
    if not told or int(told[3]) >= int(told[2]):
        raise ValueError(f"hosts {hosts!r}: give auto, or HOST:PORT,N,I for process I (from 0) of N, as in 10.0.0.1:1234,4,0")
    return told[1], int(told[2]), int(told[3])


def is_first_process() -> bool:
    """Is this the process that writes what is written once?"""
    return jax.process_index() == 0


def barrier(what: str) -> None:
    """For all processes to come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def any_process(flag: bool) -> bool:
    """Does it hold in any of the processes?"""
    return flag if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.array(flag)).any())


@contextmanager
def exit_together() -> Iterator[None]:
    """What ends one of several processes ends all: one that is in error leaves at once and does not wait at the exit for those that wait for it.

    They then lose their connection, or (where a device waits without end) the heartbeat: JAX ends them within 100 s.
    """
    try:
        yield
    except Exception as error:
        if jax.process_count() == 1:
            raise
        lost = isinstance(error, jax.errors.JaxRuntimeError)
        if not lost and not isinstance(error, ValueError):
            traceback.print_exc()
        reason = "another process of this run is lost: start all of them again, with --resume to go on from the last checkpoint" if lost else error
        detail = f" ({next(iter(str(error).splitlines()), '')[:200]})" if lost else ""
        print(f"paligemma-jax: process {jax.process_index()}: {reason}{detail}", file=sys.stderr, flush=True)
        os._exit(1 if lost else 2)
