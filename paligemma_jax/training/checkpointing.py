"""The checkpoints of a run: training states that Orbax saves in the background."""

from __future__ import annotations

import logging
import math
import os
import shutil
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EDQUOT, EFBIG, EIO, ENOSPC
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax import Array

from convert.typed_json import decode
from paligemma_jax.checkpoints.runs import CHECKPOINTS, DAMAGED, STATE, checkpoint_steps
from paligemma_jax.sharding import hosts
from paligemma_jax.training.measures import Criterion, Measured, Metrics, finite
from paligemma_jax.training.trainer import TrainState

WRITE_ERRORS = ENOSPC, EDQUOT, EFBIG, EIO


class Checkpoints:
    """Saves and restores the states of a run in its directory `folder`.

    The last `keep` checkpoints and the best by `criterion` are kept.
    """

    def __init__(self, folder: Path, keep: int, criterion: Criterion = Criterion()):
        _silence_threads()
        self.folder, self.keep, self.criterion = folder.resolve(), keep, criterion
        if hosts.is_first_process():
            self._set_aside(self._without_metadata())
        hosts.barrier("checkpoints")
        self.manager = self._open()

    def metrics(self, step: int) -> Metrics:
        """Read the metrics of a checkpoint. ValueError if they are damaged."""
        file = self.folder / CHECKPOINTS / str(step) / "metrics" / "metrics"
        if not file.is_file():
            return Metrics()
        content = file.read_bytes().replace(b"Infinity", b"null")  # as older versions wrote
        return decode(content, Metrics, str(file))

    def best_step(self) -> int | None:
        """The best step by the criterion, if any was validated; the first of several."""
        scores = {step: self.metrics(step).best for step in checkpoint_steps(self.folder)}
        validated = {step: score for step, score in scores.items() if score is not None}
        return max(validated, key=lambda step: validated[step]) if validated else None

    def last_step(self) -> int | None:
        """The step of the last complete checkpoint."""
        return max(checkpoint_steps(self.folder), default=None)

    def restore(self, state: TrainState) -> TrainState:
        """The last checkpoint that is intact, or `state` if there is none at all.

        Later ones are moved to damaged/, with a warning.

        Raises:
            ValueError: All are damaged.
        """
        steps, damaged = self.manager.all_steps(), {}
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        for step in sorted(steps, reverse=True):
            restored = self._read(step, target)
            if not isinstance(restored, str):
                if damaged:
                    if hosts.is_first_process():
                        self._set_aside(damaged)
                    hosts.barrier("damaged")
                    self.manager.close()
                    self.manager = self._open()
                return restored
            damaged[step] = restored
        if damaged:
            self._set_aside(damaged)
        return state

    def load(self, step: int, state: TrainState) -> TrainState:
        """The checkpoint of a step. `state` has its structure.

        Raises:
            ValueError: It is damaged.
        """
        restored = self._read(step, jax.tree.map(ocp.utils.to_shape_dtype_struct, state))
        if isinstance(restored, str):
            raise ValueError(f"checkpoint {step} of {self.folder} is damaged ({restored})")
        return restored

    def save(self, step: int, state: TrainState, measured: Measured) -> None:
        """Start to save a checkpoint. Writing continues in the background, until `finish`.

        Args:
            measured: May have "validation_loss" and metrics.
        """
        loss, score = finite(measured.get("validation_loss")), self.criterion.score(measured)
        metrics = {"validation_loss": loss, "score": score, "checksum": int(_checksum(state))}
        if jax.default_backend() == "cpu":  # Orbax reads the memory that the next step reuses
            state = jax.tree.map(jnp.copy, state)
        self.finish()  # so that what it replaces is removed before the space is measured
        self._check_space(sum(x.nbytes for x in jax.tree.leaves(state)) // jax.process_count())
        with self._one_line_errors():
            self.manager.save(step, args=ocp.args.StandardSave(state), metrics=metrics)

    def finish(self) -> None:
        """Wait until everything is written."""
        with self._one_line_errors():
            self.manager.wait_until_finished()

    def _check_space(self, nbytes: int) -> None:
        """Raise ValueError if the disk is too full for a state. Compression saves a few percent."""
        free = shutil.disk_usage(self.folder).free
        if hosts.any_process(free < 0.8 * nbytes):
            needed = f"needs {nbytes / 1e9:.2g} GB, but only {free / 1e9:.2g} GB are free"
            raise ValueError(self._not_written(needed))

    def _not_written(self, reason: str) -> str:
        last = self.last_step()
        kept = "there is none" if last is None else f"the last complete one is of step {last}"
        return (
            f"a checkpoint could not be written to {self.folder}: {reason}; {kept}. Make room, "
            "then continue with --resume"
        )

    def _open(self) -> ocp.CheckpointManager:
        return ocp.CheckpointManager(self.folder / CHECKPOINTS, options=_options(self.keep))

    def _read(self, step: int, target: TrainState) -> TrainState | str:
        """The state of a step, or why it cannot be read. All processes return the same."""
        restored, reason = None, ""
        try:
            restored = self.manager.restore(step, args=ocp.args.StandardRestore(target))
            if self.metrics(step).checksum not in (None, int(_checksum(restored))):
                reason = "its checksum differs"
        except (MemoryError, jax.errors.JaxRuntimeError):
            raise
        except Exception as error:  # of Orbax, tensorstore and json
            reason = _first_line(error)
        if hosts.any_process(bool(reason)):
            return reason or "damaged in another process"
        return restored  # type: ignore[return-value]

    def _without_metadata(self) -> dict[int, str]:
        """The checkpoints that Orbax cannot open at all, and why."""
        damaged = {}
        for step in checkpoint_steps(self.folder):
            try:
                self.metrics(step)
                if not (self.folder / CHECKPOINTS / str(step) / STATE).is_dir():
                    damaged[step] = f"{STATE}/ is missing"
            except ValueError as error:
                damaged[step] = str(error)
        return damaged

    def _set_aside(self, damaged: dict[int, str]) -> None:
        """Move checkpoints to damaged/, where no later run finds them, with a warning.

        Raises:
            ValueError: There is no other.
        """
        intact = [step for step in checkpoint_steps(self.folder) if step not in damaged]
        if damaged and not intact:
            listed = "; ".join(f"{step}: {reason}" for step, reason in damaged.items())
            raise ValueError(f"{self.folder} has no intact checkpoint ({listed}): start a new run")
        for step, reason in damaged.items():
            target = self.folder / DAMAGED / str(step)
            target.parent.mkdir(exist_ok=True)
            shutil.rmtree(target, ignore_errors=True)
            os.rename(self.folder / CHECKPOINTS / str(step), target)
            warnings.warn(
                f"checkpoint {step} of {self.folder} is damaged ({reason}) and was moved to "
                f"{DAMAGED}/; the last one is now of step {intact[-1]}",
                stacklevel=4,
            )

    @contextmanager
    def _one_line_errors(self) -> Iterator[None]:
        """Turn an error of Orbax's threads into one line, and free the space they have used."""
        try:
            yield
        except Exception as error:
            if not isinstance(error, OSError) and ".orbax-checkpoint-tmp" not in str(error):
                raise
            reasons = [os.strerror(code) for code in WRITE_ERRORS]
            reason = next((text for text in reasons if text in str(error)), _first_line(error))
            self._remove_unfinished()
            raise ValueError(self._not_written(reason)) from None

    def _remove_unfinished(self) -> None:
        """Remove what an error left. Orbax's threads may write for a moment longer, and create
        directories again, so look until there is nothing three times in a row."""
        empty, deadline = 0, time.monotonic() + 10
        while empty < 3 and time.monotonic() < deadline:
            unfinished = list((self.folder / CHECKPOINTS).glob("*.orbax-checkpoint-tmp"))
            empty = 0 if unfinished else empty + 1
            for folder in unfinished:
                shutil.rmtree(folder, ignore_errors=True)
            time.sleep(0.1)


@cache
def _silence_threads() -> None:
    """Keep threads of Orbax and tensorstore from printing errors that are raised here as well.

    They print through four channels: their log, asyncio's, threads' and unraisable errors.
    """
    logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)
    logging.getLogger("asyncio").addFilter(
        lambda record: not (record.exc_info and _is_echo(record.exc_info[1]))
    )
    in_thread, unraisable = threading.excepthook, sys.unraisablehook

    def in_thread_hook(error: threading.ExceptHookArgs) -> None:
        if not _is_echo(error.exc_value):
            in_thread(error)

    def unraisable_hook(error: sys.UnraisableHookArgs) -> None:
        if not _is_echo(error.exc_value):
            unraisable(error)

    threading.excepthook, sys.unraisablehook = in_thread_hook, unraisable_hook


def _is_echo(error: BaseException | None) -> bool:
    """Whether a background error only repeats that a write failed, or comes after it."""
    text = str(error)
    return text == "Event loop is closed" or any(os.strerror(code) in text for code in WRITE_ERRORS)


@jax.jit
def _checksum(state: TrainState) -> Array:
    """The sum of the bits of all arrays, modulo 2**32. Independent of the sharding."""

    def bits(x: Array) -> Array:
        return jnp.sum(
            jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}"), dtype="uint32"
        )

    return jnp.sum(jnp.stack([bits(x) for x in jax.tree.leaves(state)]), dtype="uint32")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _options(keep: int) -> ocp.CheckpointManagerOptions:
    def score(metrics: dict[str, float | None]) -> float:
        best = Metrics(metrics.get("validation_loss"), metrics.get("score")).best
        return -math.inf if best is None else best

    policies = ocp.checkpoint_managers
    # A checkpoint without metrics was being removed when the process was killed.
    best = policies.BestN(get_metric_fn=score, n=1, keep_checkpoints_without_metrics=False)
    return ocp.CheckpointManagerOptions(
        preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), best]),
        best_fn=score,  # without it, metrics are not written and a resumed run would lose its best
        enable_async_checkpointing=True,
    )
