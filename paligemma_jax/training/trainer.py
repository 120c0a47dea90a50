"""The training step: parameters by path, split into what learns and what is frozen, and one compiled update."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from paligemma_jax.lora import lora_dropout
from paligemma_jax.model.paligemma import PaliGemma
from paligemma_jax.model.stack import remat
from paligemma_jax.model.tree import parameters, with_parameters
from paligemma_jax.sharding.arrays import distribute
from paligemma_jax.sharding.compiled import constrain_tree, mesh_jit
from paligemma_jax.sharding.mesh import mesh_of
from paligemma_jax.sharding.rules import shardings
from paligemma_jax.training.batches import Batch
from paligemma_jax.training.config import FinetuneConfig
from paligemma_jax.training.losses import answer_loss
from paligemma_jax.training.optimizers import make_optimizer

Parameters = dict[str, Array]
Loss = Callable[[Any, Any, int], tuple[Array, Array]]  # of model, batch and `max_targets`: the sum of losses, and what to divide it by


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """What a step changes, and so what a checkpoint holds. The random numbers of a step are a function of the seed and its number."""

    step: Array  # int32: steps done
    learns: Parameters  # float32
    optimizer: Any
    average: Parameters  # of `learns`; empty without --ema


class Trainer:
    """The model split into what learns and what is frozen, and the compiled functions over them.

    `loss` is by default that of `config` on a `Batch`; with another, the model and the batch can be any pytrees. Where the model lies on a mesh,
    gradients and the optimizer's state are split as the parameters are.
    """

    def __init__(self, model: Any, config: FinetuneConfig, steps: int, loss: Loss | None = None):
        self.config, self.loss = config, loss or partial(_answer_loss, config)
        values = parameters(model)
        self.model = with_parameters(model, lambda path: jax.ShapeDtypeStruct(values[path].shape, values[path].dtype))
        self.names = [path for path, value in values.items() if re.fullmatch(config.pattern, path) and jnp.issubdtype(value.dtype, jnp.floating)]
        if not self.names:
            raise ValueError(f"--train {config.train!r} matches no parameter; paths look like decoder/layers/3/attention/q/kernel")
        self.frozen = {path: value for path, value in values.items() if path not in set(self.names)}
        self._first = {path: values[path] for path in self.names}
        self.optimizer = make_optimizer(config, steps)
        self.mesh = mesh_of(values)
        self.step = mesh_jit(self._step, static_argnames="max_targets", donate_argnames="state")
        self.losses = mesh_jit(self._losses, static_argnames="max_targets")

    def start(self) -> TrainState:
        """The state before the first step. Once: what it was made of is not kept, for it may fill the device."""
        learns = {path: jnp.array(self._first.pop(path), jnp.float32) for path in self.names}
        where = shardings(jax.eval_shape(self.optimizer.init, learns), self.mesh) if self.mesh else None
        optimizer = jax.jit(self.optimizer.init, out_shardings=where)(learns) if where else self.optimizer.init(learns)
        return TrainState(distribute(jnp.int32(0), self.mesh), learns, optimizer, jax.tree.map(jnp.copy, learns) if self.config.ema else {})

    def filled(self, learns: Parameters, frozen: Parameters) -> Any:
        return with_parameters(self.model, (frozen | learns).__getitem__)

    def result(self, state: TrainState) -> Any:
        """The model as measured and saved: with the average, where there is one."""
        return self.filled(state.average or state.trainable, self.frozen)

    def _losses(self, learns: Parameters, frozen: Parameters, batch: Any, max_targets: int) -> tuple[Array, Array]:
        """The sum of the batch's losses, and what to divide it by."""
        with remat(self.config.remat):
            return self.loss(self.filled(learns, frozen), batch, max_targets)

    def _step(self, state: TrainState, frozen: Parameters, batch: Any, max_targets: int) -> tuple[TrainState, dict[str, Array]]:
        """One update. The parts of the batch add up their sums, divided once: the gradient is that of the whole."""
        key = jax.random.fold_in(jax.random.key(self.config.seed), state.step)

        def gradients(part: Any, key: Array) -> Any:
            with lora_dropout(key):
                return constrain_tree(jax.value_and_grad(self._losses, has_aux=True)(state.trainable, frozen, part, max_targets))

        if (parts := self.config.accumulate) == 1:
            (loss, count), gradient = gradients(batch, key)
        else:
            rows = jax.tree.map(lambda a: a.reshape(parts, -1, *a.shape[1:]), batch), jax.random.split(key, parts)
            zero = (jnp.float32(0), jnp.float32(0)), jax.tree.map(jnp.zeros_like, state.trainable)
            add = lambda total, row: (jax.tree.map(jnp.add, total, gradients(*row)), None)
            ((loss, count), gradient), _ = jax.lax.scan(add, zero, rows)
        count = jnp.maximum(count, 1e-9)
        loss, norm = loss / count, optax.tree.norm(gradient) / count
        clip = jnp.minimum(1, self.config.clip / jnp.maximum(norm, 1e-9)) if self.config.clip else 1.0
        gradient = jax.tree.map(lambda g: g * (clip / count), gradient)  # at once: the gradient of all weights is held but once
        updates, optimizer = self.optimizer.update(gradient, state.optimizer, state.trainable)
        learns: Any = optax.apply_updates(state.trainable, updates)
        average = optax.incremental_update(learns, state.average, 1 - self.config.ema) if self.config.ema else {}
        new = TrainState(state.step + 1, learns, optimizer, average)  # type: ignore[arg-type]
        new = jax.tree.map(partial(jnp.where, jnp.isfinite(loss + norm)), new, state)  # what is not a number changes nothing
        return constrain_tree(new), {"loss": loss, "gradient_norm": norm}


def _answer_loss(config: FinetuneConfig, model: PaliGemma, batch: Batch, max_targets: int) -> tuple[Array, Array]:
    options: Any = dict(reduction=config.reduction, smoothing=config.label_smoothing)
    return answer_loss(model, batch.inputs, batch.weights, max_targets, batch.features, **options)
