"""Learning rate schedules and optimizers, built from optax."""

from __future__ import annotations

import re
from collections.abc import Mapping

import optax
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import PyTree
from optax.contrib import MuonDimensionNumbers, muon

from paligemma_jax.training.config import FinetuneConfig


def make_schedule(config: FinetuneConfig, steps: int) -> optax.Schedule:
    """Make the learning rate schedule by step, counted from 0: linear warmup, then
    `config.schedule`, which ends at 0 after the last step unless it is constant."""
    peak, warmup = config.learning_rate, config.warmup
    warmup = min(round(warmup if warmup >= 1 else warmup * steps), steps)
    rest = max(steps - warmup, 1)
    schedule = {
        "cosine": optax.cosine_decay_schedule(peak, rest),
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "constant": optax.constant_schedule(peak),
    }[config.schedule]
    if not warmup:
        return schedule

    def warm_up(step: ArrayLike) -> ArrayLike:
        return peak * (step + 1) / warmup  # the first step already trains

    return optax.join_schedules([warm_up, schedule], [warmup])


def make_optimizer(config: FinetuneConfig, steps: int) -> optax.GradientTransformation:
    """Make the optimizer of a dict path -> parameter, for gradients that are already clipped.

    Weight decay is decoupled and scaled by the learning rate with every optimizer
    (`optax.adafactor` alone would not scale it). Adam's eps is 1e-8, as in torch.
    """
    rate, decay = make_schedule(config, steps), config.weight_decay
    match config.optimizer:
        case "adamw":
            optimizer = optax.adamw(
                rate, config.beta1, config.beta2, weight_decay=decay, mask=decay_mask
            )
        case "adafactor":
            optimizer = optax.chain(
                optax.scale_by_factored_rms(),
                optax.clip_by_block_rms(1.0),
                optax.add_decayed_weights(decay, decay_mask),
                optax.scale_by_learning_rate(rate),
            )
        case "sgd":
            optimizer = optax.chain(
                optax.add_decayed_weights(decay, decay_mask), optax.sgd(rate, config.beta1)
            )
        case "muon":
            optimizer = muon(
                rate,
                consistent_rms=0.2,
                adam_b1=config.beta1,
                adam_b2=config.beta2,
                weight_decay=decay,
                weight_decay_mask=decay_mask,
                muon_weight_dimension_numbers=muon_axes,  # type: ignore[arg-type]
            )
    if config.vision_rate == 1:
        return optimizer

    def scale_vision(updates: PyTree, _: PyTree) -> PyTree:
        return {
            path: update * config.vision_rate if path.startswith("vision/") else update
            for path, update in updates.items()
        }

    return optax.chain(optimizer, optax.stateless(scale_vision))


def decay_mask(parameters: Mapping[str, Array]) -> dict[str, bool]:
    """Which parameters are decayed: matrices and tables, not norms, biases and magnitudes."""
    undecayed = r".*/(scale|bias|lora_magnitude)"
    return {path: not re.fullmatch(undecayed, path) for path in parameters}


def muon_axes(parameters: Mapping[str, Array]) -> dict[str, MuonDimensionNumbers | None]:
    """The input and output axes of the parameters that Muon trains, the kernels of the layers; None
    for the others."""

    def axes(path: str, value: Array) -> MuonDimensionNumbers | None:
        if "/layers/" not in path or not path.endswith("/kernel"):
            return None
        first = 0 if re.search(r"/layers/\d", path) else 1  # after the layer axis of a stack
        outputs = 1 if value.ndim - first == 2 or path.endswith("o/kernel") else 2
        split = first + outputs
        return MuonDimensionNumbers(tuple(range(split, value.ndim)), tuple(range(first, split)))

    return {path: axes(path, value) for path, value in parameters.items()}
