"""Train with both programs, and compare every step and the complete runs."""

from __future__ import annotations

import resource
import time
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from paligemma_jax.checkpoints.load import abstract_model
from paligemma_jax.data.progress import progress_bar
from paligemma_jax.model.paligemma import PaliGemma
from paligemma_jax.model.stack import unstack_model
from paligemma_jax.model.tree import with_parameters
from paligemma_jax.parity.reference import available_memory, weight_bytes
from paligemma_jax.parity.training.case import TrainingCase
from paligemma_jax.parity.training.local import (
    GradientComparison,
    LocalError,
    UpdateComparison,
    squared_error,
)
from paligemma_jax.parity.training.reference import TorchRun, Values
from paligemma_jax.training.prepare import prepare_model
from paligemma_jax.training.trainer import Parameters, Trainer

COPIES = 16  # models in memory: two, their gradients and moments, and snapshots
DISTANCE_EVERY = 100  # steps
SEEDS = 5  # runs of the reference in bfloat16, with other orders of the rows


@dataclass(frozen=True)
class Distance:
    """How far the parameters of both runs are apart after a step, relative to how far the
    reference has moved."""

    step: int  # finished steps
    overall: float
    parameter: str  # the worst
    worst: float


@dataclass(frozen=True)
class TrainingReport:
    """Two runs. Losses are float64[steps, 2]: this project's and the reference's."""

    name: str
    case: TrainingCase
    dtype: str
    losses: np.ndarray
    local: list[list[LocalError]]  # by step
    distances: list[Distance]
    seconds: float
    peak_bytes: int
    float64: np.ndarray | None = None  # the losses of both in float64
    # In bfloat16, losses float64[SEEDS, steps] of the reference; the first is that of `losses`.
    seeds: np.ndarray | None = None


def compare(
    name: str, case: TrainingCase, dtype: str = "float32", float64: bool = False
) -> TrainingReport:
    """Train both models.

    Args:
        name: For the report.
        dtype: "float32", or "bfloat16" for activations.
        float64: Train both in float64 too, which tells rounding from a difference.

    Raises:
        ValueError: They do not fit in memory, or the reference cannot load its model.
    """
    start = time.perf_counter()
    _check_memory(name, case)
    with jax.default_matmul_precision("highest"):
        losses, local, distances = _compare_steps(case, dtype)
        seeds = _other_orders(case, losses[:, 1]) if dtype == "bfloat16" else None
        exact = _float64_losses(case) if float64 else None
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return TrainingReport(name, case, dtype, losses, local, distances, seconds, peak, exact, seeds)


def _compare_steps(
    case: TrainingCase, dtype: str
) -> tuple[np.ndarray, list[list[LocalError]], list[Distance]]:
    model = trainable_model(case, dtype)
    trainer = Trainer(model, case.config, case.steps)
    reference = TorchRun(case, model, trainer.trainable, dtype)
    del model
    state = trainer.start()
    first = reference.snapshot().parameters
    gradient_errors = GradientComparison(case, trainer)
    update_errors = UpdateComparison(case, first)
    losses, local, distances = np.zeros((case.steps, 2)), [], []
    for step in progress_bar(range(case.steps), "training"):
        batch = case.batch(step)
        theirs = reference.step(batch)
        local.append(gradient_errors(batch, theirs) + update_errors(step, theirs))
        state, report = trainer.step(state, trainer.frozen, batch, max_targets=case.max_targets)
        losses[step] = float(report["loss"]), theirs.loss
        done = step + 1
        if done % DISTANCE_EVERY == 0 or done == case.steps:
            after = theirs.after.parameters
            distances.append(_distance(done, state.trainable, after, first))
    return losses, local, distances


def trainable_model(case: TrainingCase, dtype: str) -> PaliGemma:
    """The model of a run with its layers as a list, so that errors name the layer.

    Parameters are in float32, or in float64 for float64.
    """
    checkpoint = case.weights.checkpoint
    parameter_dtype = "float64" if dtype == "float64" else "float32"

    def read(path: str) -> jax.Array:
        return jnp.asarray(checkpoint.tensors[path].load(), parameter_dtype)

    config = replace(checkpoint.config, dtype=dtype, attention="plain")
    model = prepare_model(with_parameters(abstract_model(config), read), case.config)
    # A new adapter is in float32.
    model = jax.tree.map(lambda x: x.astype(parameter_dtype), model)
    return unstack_model(model) if case.config.layers == "stack" else model


def _distance(step: int, ours: Parameters, theirs: Values, start: Values) -> Distance:
    apart = {path: squared_error(ours[path], theirs[path]) for path in theirs}
    moved = {path: squared_error(start[path], theirs[path]) for path in theirs}
    total = sum(moved.values())

    def relative(path: str) -> float:
        return (apart[path] / moved[path]) ** 0.5 if moved[path] > 1e-12 * total else 0.0

    worst = max(theirs, key=relative)
    overall = (sum(apart.values()) / total) ** 0.5 if total else 0.0
    return Distance(step, overall, worst, relative(worst))


def _other_orders(case: TrainingCase, first: np.ndarray) -> np.ndarray:
    """The reference's losses with other orders of the rows, beside those of the case itself."""
    model = trainable_model(case, "bfloat16")
    trainable = Trainer(model, case.config, case.steps).trainable
    runs = [first]
    for seed in range(1, SEEDS):
        other = replace(case, config=replace(case.config, seed=case.config.seed + seed))
        reference = TorchRun(other, model, trainable, "bfloat16")
        steps = progress_bar(range(case.steps), f"order {seed + 1} of {SEEDS}")
        runs.append(np.array([reference.loss(other.batch(step)) for step in steps]))
    return np.stack(runs)


def _float64_losses(case: TrainingCase) -> np.ndarray:
    """The losses of both runs in float64."""
    losses = np.zeros((case.steps, 2))
    with jax.enable_x64(True), jax.default_device(jax.local_devices(backend="cpu")[0]):
        model = trainable_model(case, "float64")
        trainer = Trainer(model, case.config, case.steps)
        reference = TorchRun(case, model, trainer.trainable, "float64")
        state = trainer.start()
        for step in progress_bar(range(case.steps), "training in float64"):
            batch = case.batch(step)
            state, report = trainer.step(state, trainer.frozen, batch, max_targets=case.max_targets)
            losses[step] = float(report["loss"]), reference.loss(batch)
    return losses


def _check_memory(name: str, case: TrainingCase) -> None:
    needed, available = COPIES * weight_bytes(case.weights, "float32"), available_memory()
    if needed > available:
        raise ValueError(
            f"training {name} twice needs {needed / 2**30:.0f} GiB of memory, but only "
            f"{available / 2**30:.0f} GiB are available: compare a preset with --depth"
        )
