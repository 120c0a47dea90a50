"""One step at a time: what this project's training computes from the reference's state.

Errors do not accumulate, so a defect shows in the first step, in the first quantity and in the
parameters that it touches, and nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from paligemma_jax.parity.compare import GRADIENT_LIMIT
from paligemma_jax.parity.training.case import TrainingCase
from paligemma_jax.parity.training.reference import ReferenceStep, Snapshot, Values
from paligemma_jax.training.batches import Batch
from paligemma_jax.training.config import FinetuneConfig
from paligemma_jax.training.trainer import Parameters, Trainer, TrainState

SCALAR_LIMIT = 1e-5  # relative
UPDATE_LIMIT = 1e-5  # relative, of each parameter, beside the rounding of the parameter
# In bfloat16, the error of a gradient over the reference's own. Both are random: the
# largest measured ratio of 1,000 single steps is 5.2.
STEP_RATIO = 10.0
FLOAT32_EPS = 2**-23
LOGIT = 30.0  # the largest: the loss is a difference of logits, which are rounded
SMALL_LOSS = 0.3  # below it, probabilities near 1 leave few digits of their distance from 1
# Of the norm of all gradients: what is added to the scale of each. A gradient far below it, such as
# that of the bias of keys, which softmax ignores, is nothing but rounding.
NEGLIGIBLE = 1e-3


@dataclass(frozen=True)
class LocalError:
    """The worst error of one quantity in one step."""

    quantity: str
    parameter: str  # the worst one; "" for a single number
    error: float  # relative
    limit: float
    diverging: tuple[str, ...] = ()  # parameters over their limit

    @property
    def diverges(self) -> bool:
        return not self.error <= self.limit


class GradientComparison:
    """Computes the loss and the gradient at the reference's parameters.

    Args:
        trainer: A trainer of the case.
    """

    def __init__(self, case: TrainingCase, trainer: Trainer):
        self.frozen = trainer.frozen

        def mean_loss(trainable: Parameters, frozen: Parameters, batch: Batch) -> Array:
            total, count = trainer.losses(trainable, frozen, batch, max_targets=case.max_targets)
            return total / count

        self.loss_and_gradient = jax.jit(jax.value_and_grad(mean_loss))

    def __call__(self, batch: Batch, reference: ReferenceStep) -> list[LocalError]:
        """The errors of a step. In bfloat16, that of the gradient is in units of the reference's
        own."""
        loss, gradient = self.loss_and_gradient(reference.before.parameters, self.frozen, batch)
        return [_loss_error(float(loss), reference), _gradient_error(gradient, reference)]


class UpdateComparison:
    """Computes an update from the reference's gradient, moments and parameters.

    Args:
        parameters: Trained parameters, of which only the shapes matter.
    """

    def __init__(self, case: TrainingCase, parameters: Values):
        self.updater = _updater(case.config, case.steps, parameters)
        self.peak = case.config.learning_rate
        self.start = self.updater.start()

    def __call__(self, index: int, reference: ReferenceStep) -> list[LocalError]:
        """The errors of a step, counted from 0, in order of computation."""
        before, after = reference.before, reference.after
        state = _with_moments(self.start, index, before)
        state, report = self.updater.step(state, {}, reference.gradient, max_targets=0)
        first, second = (optax.tree.get(state.optimizer, name) for name in ("mu", "nu"))
        updates = _update_errors(state.trainable, after.parameters, before.parameters)
        return [
            _scalar("gradient norm", float(report["gradient_norm"]), reference.norm),
            _scalar("learning rate", float(report["learning_rate"]), reference.rate, self.peak),
            _worst("first moment", _update_errors(first, after.first_moments)),
            _worst("second moment", _update_errors(second, after.second_moments)),
            _worst("update", updates),
        ]


def _updater(config: FinetuneConfig, steps: int, parameters: Values) -> Trainer:
    """A trainer whose loss has any given gradient, so that clipping, schedule, moments and decay
    are those of `Trainer` itself."""

    def linear(parameters: Parameters, gradient: Parameters, _: int) -> tuple[Array, Array]:
        products = [jnp.vdot(parameters[path], gradient[path]) for path in parameters]
        return sum(products, jnp.zeros(())), jnp.ones(())

    own = replace(config, reduction="tokens", label_smoothing=0.0, accumulate=1)
    return Trainer(dict(parameters), own, steps, loss=linear)


def _with_moments(start: TrainState, index: int, snapshot: Snapshot) -> TrainState:
    """A state after `index` steps, with the reference's parameters and moments."""
    moments = {"mu": snapshot.first_moments, "nu": snapshot.second_moments}
    count = np.int32(index)
    optimizer = optax.tree.set(start.optimizer, count=count, **moments)
    parts = jax.tree.map(jnp.array, (count, snapshot.parameters, optimizer))
    return TrainState(*parts, average={})  # of copies, since a step takes its state apart


def _scalar(quantity: str, ours: float, theirs: float, scale: float | None = None) -> LocalError:
    """The error of a number, relative to the reference or to `scale`."""
    scale = abs(theirs) if scale is None else scale
    error = abs(ours - theirs) / scale if scale else math.inf if ours else 0.0
    return LocalError(quantity, "", error, SCALAR_LIMIT)


def _loss_error(ours: float, reference: ReferenceStep) -> LocalError:
    """A small loss has few digits; in bfloat16 it may be off by as much as a logit is rounded."""
    rounding = LOGIT * (2**-8 if reference.exact else FLOAT32_EPS)
    limit = SCALAR_LIMIT + rounding / max(abs(reference.loss), 1e-30)
    return replace(_scalar("loss", ours, reference.loss), limit=limit)


def _gradient_error(ours: Parameters, reference: ReferenceStep) -> LocalError:
    exact = reference.exact
    if exact:
        total = math.sqrt(sum(squared_error(ours[path], exact[path]) for path in ours))
        own = math.sqrt(sum(squared_error(reference.gradient[path], exact[path]) for path in ours))
        return LocalError("gradient", "", total / own, STEP_RATIO)
    limit = GRADIENT_LIMIT * max(1.0, SMALL_LOSS / max(reference.loss, 1e-30))
    floor = NEGLIGIBLE * reference.norm

    def errors() -> Iterator[tuple[str, float, float]]:
        for path, theirs in reference.gradient.items():
            scale = float(np.linalg.norm(theirs)) + floor
            error = math.sqrt(squared_error(ours[path], theirs))
            yield path, error / scale if scale else 0.0, limit

    return _worst("gradient", errors())


def _update_errors(
    ours: Parameters, theirs: Values, before: Values | None = None
) -> Iterator[tuple[str, float, float]]:
    """(path, relative error, limit). With `before`, relative to the change. Its smallest part is
    lost when it is added to a parameter, so a change that is smaller than that is not the scale."""
    for path, expected in theirs.items():
        change = expected if before is None else expected - before[path]
        scale = float(np.linalg.norm(change.astype(np.float64)))
        error = math.sqrt(squared_error(ours[path], expected))
        if before is not None:
            rounding = float(np.finfo(expected.dtype).eps * np.linalg.norm(expected))
            scale += rounding / UPDATE_LIMIT
        yield path, error / scale if scale else math.inf if error else 0.0, UPDATE_LIMIT


def _worst(quantity: str, errors: Iterator[tuple[str, float, float]]) -> LocalError:
    rows = list(errors)
    path, error, limit = max(rows, key=lambda row: np.nan_to_num(row[1] / row[2], nan=math.inf))
    diverging = tuple(path for path, error, limit in rows if not error <= limit)
    return LocalError(quantity, path, error, limit, diverging)


def squared_error(a: Array | np.ndarray, b: np.ndarray) -> float:
    """The squared norm of the difference, in float64."""
    difference = np.asarray(a, np.float64).reshape(-1) - b.astype(np.float64).reshape(-1)
    return float(difference @ difference)
