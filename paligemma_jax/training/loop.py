"""The loop of a run: steps, log, validation and checkpoints, until the end or SIGTERM."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import jax
import numpy as np

from paligemma_jax.data.progress import progress_bar
from paligemma_jax.model.flops import training_flops
from paligemma_jax.sharding import devices, hosts
from paligemma_jax.sharding.arrays import shard_batch
from paligemma_jax.training.batches import Batch, max_targets, prefetch
from paligemma_jax.training.callbacks import Callback, StepEvent, run_callbacks
from paligemma_jax.training.checkpointing import Checkpoints
from paligemma_jax.training.objective import Rollouts
from paligemma_jax.training.runs import LogLine, Run
from paligemma_jax.training.trainer import Trainer, TrainState
from paligemma_jax.training.validation import Validation


def train(
    trainer: Trainer,
    run: Run,
    checkpoints: Checkpoints,
    state: TrainState,
    steps: int,
    make_batch: Callable[[int], Batch] | Rollouts,
    validate: Validation,
    callbacks: Sequence[Callback] = (),
) -> tuple[TrainState, bool]:
    """Train until `steps`, until a callback ends the run, or until a process of it receives
    SIGTERM.

    Args:
        make_batch: The batch of a step, counted from 0; or what makes it from the parameters.

    Returns:
        The last state, and whether the run has ended rather than being interrupted.
    """
    config, first = trainer.config, int(state.step)
    ended = first == steps
    flops_rate = devices.matrix_rate(trainer.model.config.activation_dtype)
    rollouts = None if callable(make_batch) else make_batch
    make = make_batch if callable(make_batch) else make_batch.draw
    batches = prefetch(partial(make, step) for step in range(first, steps))
    size = config.batch_size
    bar = progress_bar(desc="finetune", total=steps * size, initial=first * size)
    with _received_sigterm() as received, bar:
        start = time.perf_counter()
        for step, batch in enumerate(batches, first + 1):
            measures: dict[str, float] = {}
            if rollouts:
                batch, measures = rollouts.batch(batch, state)
            placed = shard_batch(batch, trainer.mesh)
            state, report = trainer.step(
                state, trainer.frozen, placed, max_targets=max_targets(batch)
            )
            line = {"step": step, **{name: float(value) for name, value in report.items()}}
            line |= measures | _speed(trainer, batch, time.perf_counter() - start, flops_rate)
            if not np.isfinite([line["loss"], line["gradient_norm"]]).all():
                checkpoints.finish()
                raise ValueError(run.save_bad_batch(line, batch, checkpoints.last_step()))
            with _saving_on_error(run, checkpoints, state, line):
                if validate.is_due(step, last=step == steps):
                    validate(state, line)
                event = StepEvent(step, steps, line, state, trainer)
                told = run_callbacks(callbacks, event)
                ended = step == steps or (bool(callbacks) and hosts.any_process(told))
            run.log(line)
            bar.set_postfix(refresh=False, **_summary(line, steps))
            bar.update(size)
            stop = ended or hosts.any_process(bool(received))
            if stop or step % config.save_every == 0 or "validation_loss" in line:
                checkpoints.save(step, state, line)
            if stop:
                break
            start = time.perf_counter()  # waiting for data counts, validating and saving do not
    return state, ended


def _summary(line: LogLine, steps: int) -> dict[str, Any]:  # keywords of tqdm's set_postfix
    """The numbers of a step on the progress bar."""
    summary = {"step": f"{line['step']}/{steps}", "loss": f"{line['loss']:.4f}"}
    if "learning_rate" in line:
        summary["learning_rate"] = f"{line['learning_rate']:.2e}"
    return summary


@contextmanager
def _saving_on_error(
    run: Run, checkpoints: Checkpoints, state: TrainState, line: LogLine
) -> Iterator[None]:
    """Save a checkpoint if validation or a callback fails, so that no steps are lost. Not done in a
    multi-process run: processes save together, and not all of them may have failed."""
    try:
        yield
    except Exception:
        if jax.process_count() == 1:
            run.log(line)
            checkpoints.save(line["step"], state, line)
            checkpoints.finish()
            run.close()
        raise


def _speed(
    trainer: Trainer, batch: Batch, seconds: float, flops_rate: float
) -> dict[str, float | int]:
    """Tokens per second, model FLOPs utilization and peak memory of a step, for the log."""
    flops = training_flops(
        trainer.model.config,
        np.asarray(batch.inputs.tokens),
        np.asarray(batch.inputs.targets),
        trainer.trainable,
        encodes=batch.inputs.images is not None,
    )
    return {
        "tokens_s": float(batch.inputs.valid.sum() / seconds),
        "mfu": flops / seconds / flops_rate,
        "memory_bytes": devices.peak_bytes(),
    }


@contextmanager
def _received_sigterm() -> Iterator[list[int]]:
    """Yield a list to which SIGTERM is appended instead of ending the process."""
    received: list[int] = []
    previous = None
    if threading.current_thread() is threading.main_thread():
        previous = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        yield received
    finally:
        if previous is not None:
            signal.signal(signal.SIGTERM, previous)
