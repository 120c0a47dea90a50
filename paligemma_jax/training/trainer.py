"""The training step: parameters split into trainable and frozen, and one compiled update."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jaxtyping import PyTree

from paligemma_jax.lora import lora_dropout
from paligemma_jax.model.dropout import decoder_dropout
from paligemma_jax.model.layers import full_dtype
from paligemma_jax.model.patterns import matches, unmatched
from paligemma_jax.model.stack import remat
from paligemma_jax.model.tree import parameters, with_parameters
from paligemma_jax.sharding.arrays import distribute
from paligemma_jax.sharding.compiled import constrain_tree, mesh_jit
from paligemma_jax.sharding.mesh import mesh_of
from paligemma_jax.sharding.rules import shardings
from paligemma_jax.training.config import TRAIN_PATTERNS, FinetuneConfig
from paligemma_jax.training.loss_function import LogitsLoss, LossFunction, make_loss
from paligemma_jax.training.optimizers import (
    OwnOptimizer,
    injected_rate,
    make_optimizer,
    make_schedule,
    own_optimizer,
)

Parameters = dict[str, Array]  # by path


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """The state that a step updates and a checkpoint contains. It has no random state: random
    numbers depend only on the seed and the step."""

    step: Array  # int32[], the number of finished steps
    trainable: Parameters  # float32; float64 for a model in float64
    optimizer: optax.OptState
    average: Parameters  # moving average of `trainable`; empty without --ema


class Trainer:
    """A model split into trainable and frozen parameters, and its compiled training step.

    On a mesh, gradients and optimizer state are sharded as the parameters are.

    Args:
        model: A model, or any other pytree if there is a `loss` for it.
        config: Its `train` selects the trainable parameters.
        steps: The length of the learning rate schedule.
        loss: Loss function, as `make_loss` takes it; by default `answer_loss` of a `Batch`.
        optimizer: Optimizer, as `own_optimizer` takes it; by default that of the configuration.

    Attributes:
        trainable: Paths of the trainable parameters.
        frozen: The other parameters.
        step: (state, frozen, batch, max_targets=) -> new state, and the loss, gradient norm and, if
            it is known, learning rate. The state is donated.
        losses: (trainable, frozen, batch, max_targets=) -> the sum of the losses, and its divisor.

    Raises:
        ValueError: `train` or one of its alternatives matches no parameter, or loss or optimizer
            cannot be used.
    """

    def __init__(
        self,
        model: PyTree,
        config: FinetuneConfig,
        steps: int,
        loss: LossFunction | LogitsLoss | None = None,
        optimizer: OwnOptimizer | None = None,
    ):
        self.config = config
        self.loss = make_loss(config, loss)
        values = parameters(model)
        self.model = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), model)
        self.trainable = [
            path
            for path, value in values.items()
            if matches(config.trainable_pattern, path, value)
            and jnp.issubdtype(value.dtype, jnp.floating)
        ]
        if not self.trainable:
            raise ValueError(
                f"--train {config.train!r} matches no parameter; paths look like "
                "decoder/layers/3/attention/q/kernel"
            )
        for part in unmatched(config.train, values) if config.train not in TRAIN_PATTERNS else ():
            raise ValueError(
                f"every alternative of --train must match a parameter, got {part!r}; paths look "
                "like decoder/layers/3/attention/q/kernel"
            )
        self._initial = {path: values.pop(path) for path in self.trainable}
        self.frozen = values
        if optimizer is None:
            own, schedule = make_optimizer(config, steps), make_schedule(config, steps)
        else:
            own, schedule = own_optimizer(optimizer, config, steps)
        self.optimizer, self.schedule = optax.with_extra_args_support(own), schedule
        self.mesh = mesh_of(model)
        self.step = mesh_jit(self._step, static_argnames="max_targets", donate_argnames="state")
        self.losses = mesh_jit(self._losses, static_argnames="max_targets")

    def start(self) -> TrainState:
        """The state before the first step. Call it once: the initial parameters are not kept, since
        two copies of them may not fit on the device."""
        trainable = {
            path: jnp.array(value, full_dtype(value.dtype))
            for path, value in ((path, self._initial.pop(path)) for path in self.trainable)
        }
        init = self.optimizer.init
        if self.mesh:
            init = jax.jit(
                init, out_shardings=shardings(jax.eval_shape(init, trainable), self.mesh)
            )
        average = jax.tree.map(jnp.copy, trainable) if self.config.ema else {}
        return TrainState(distribute(jnp.int32(0), self.mesh), trainable, init(trainable), average)

    def check_loss(self, state: TrainState, batch: PyTree, max_targets: int) -> None:
        """Trace the loss of a batch, which raises the ValueErrors of `make_loss`; runs nothing."""
        losses = partial(self.losses, max_targets=max_targets)
        jax.eval_shape(losses, state.trainable, self.frozen, batch)

    def merge(self, trainable: Parameters, frozen: Parameters) -> PyTree:
        """The model with these parameters."""
        return with_parameters(self.model, (frozen | trainable).__getitem__)

    def result(self, state: TrainState) -> PyTree:
        """The model to validate and save, with averaged parameters if there are any."""
        return self.merge(state.average or state.trainable, self.frozen)

    def _losses(
        self, trainable: Parameters, frozen: Parameters, batch: PyTree, max_targets: int
    ) -> tuple[Array, Array]:
        with remat(self.config.remat):
            return self.loss(self.merge(trainable, frozen), batch, max_targets)

    def _step(
        self, state: TrainState, frozen: Parameters, batch: PyTree, max_targets: int
    ) -> tuple[TrainState, dict[str, Array]]:
        """One update. If the loss or a gradient is not finite, the state does not change."""
        (loss, count), gradient = self._gradient(state, frozen, batch, max_targets)
        count = jnp.maximum(count, 1e-9)
        loss, norm = loss / count, optax.tree.norm(gradient) / count
        clip = self.config.clip
        scale = jnp.minimum(1, clip / jnp.maximum(norm, 1e-9)) if clip else 1.0
        # Divided and clipped in one pass, so that only one full gradient is in memory.
        gradient = jax.tree.map(lambda g: g * (scale / count), gradient)
        updates, optimizer = self.optimizer.update(
            gradient, state.optimizer, state.trainable, value=loss
        )
        trainable = optax.apply_updates(state.trainable, updates)
        average = state.average
        if self.config.ema:
            average = optax.incremental_update(trainable, average, 1 - self.config.ema)
        new = TrainState(state.step + 1, trainable, optimizer, average)  # type: ignore[arg-type]
        new = jax.tree.map(partial(jnp.where, jnp.isfinite(loss + norm)), new, state)
        report = {"loss": loss, "gradient_norm": norm}
        rate = self.schedule(state.step) if self.schedule else injected_rate(optimizer)
        if rate is not None:
            report["learning_rate"] = jnp.asarray(rate)
        return constrain_tree(new), report

    def _gradient(
        self, state: TrainState, frozen: Parameters, batch: PyTree, max_targets: int
    ) -> tuple[tuple[Array, Array], Parameters]:
        """((sum of losses, divisor), gradient of the sum), added up over the parts of the batch."""
        value_and_grad = jax.value_and_grad(self._losses, has_aux=True)
        key = jax.random.fold_in(jax.random.key(self.config.seed), state.step)

        def gradient(part: PyTree, key: Array) -> tuple[tuple[Array, Array], Parameters]:
            with lora_dropout(key), decoder_dropout(self.config.dropout, key):
                return constrain_tree(value_and_grad(state.trainable, frozen, part, max_targets))

        count = self.config.accumulate
        if count == 1:
            return gradient(batch, key)
        parts = jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), batch)
        zeros = jax.tree.map(jnp.zeros_like, state.trainable)
        zero = (jnp.float32(0), jnp.float32(0)), zeros

        def add(total: PyTree, part: PyTree) -> tuple[PyTree, None]:
            return jax.tree.map(jnp.add, total, gradient(*part)), None

        return jax.lax.scan(add, zero, (parts, jax.random.split(key, count)))[0]
