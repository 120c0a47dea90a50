"""Schedules and optimizers of optax, put together from a `Finetune`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import optax
from optax.contrib import MuonDimensionNumbers, muon

from paligemma_jax.training.config import FinetuneConfig


def make_schedule(config: FinetuneConfig, steps: int) -> optax.Schedule:
    """The learning rate by step: a linear warm-up, whose first step learns already, then as `config.schedule` says, down to 0 after the last step."""
    warmup = min(round(config.warmup if config.warmup >= 1 else config.warmup * steps), steps)
    rest = max(steps - warmup, 1)
    after = {
        "cosine": optax.cosine_decay_schedule(config.learning_rate, rest),
        "linear": optax.linear_schedule(config.learning_rate, 0.0, rest),
        "constant": optax.constant_schedule(config.learning_rate),
    }[config.schedule]
    if not warmup:
        return after
    up = lambda step: config.learning_rate * (step + 1) / warmup  # the first step already learns
    return optax.join_schedules([up, after], [warmup])


def make_optimizer(config: FinetuneConfig, steps: int) -> optax.GradientTransformation:
    """Of a dict path -> parameter, whose gradient is clipped already; Adam's eps is torch's 1e-8.

    A step takes the learning rate times the decay of each weight, with every rule (`optax.adafactor` alone would take the decay whatever the rate).
    """
    schedule, decay = make_schedule(config, steps), config.weight_decay
    if config.optimizer == "adamw":
        rule = optax.adamw(schedule, config.beta1, config.beta2, weight_decay=decay, mask=decays)
    elif config.optimizer == "adafactor":
        scaled = optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)
        rule = optax.chain(*scaled, optax.add_decayed_weights(decay, decays), optax.scale_by_learning_rate(schedule))
    elif config.optimizer == "sgd":
        rule = optax.chain(optax.add_decayed_weights(decay, decays), optax.sgd(schedule, config.beta1))
    else:
        rule = muon(
            schedule, consistent_rms=0.2, adam_b1=config.beta1, adam_b2=config.beta2,
            weight_decay=decay, weight_decay_mask=decays, muon_weight_dimension_numbers=matrices,  # type: ignore[arg-type]
        )  # fmt: skip
    return optax.chain(rule, optax.stateless(_slower(config.vision_rate))) if config.vision_rate != 1 else rule


def _slower(rate: float) -> Any:
    """The updates of the image encoder times `rate`."""
    return lambda updates, _: {path: update * rate if path.startswith("vision/") else update for path, update in updates.items()}


def decays(parameters: Mapping[str, Any]) -> dict[str, bool]:
    """Weight decay is for matrices and tables: not for norms and biases, stacked or not."""
    return {path: not re.fullmatch(r".*/(scale|bias)", path) for path in parameters}


def matrices(parameters: Mapping[str, Any]) -> dict[str, MuonDimensionNumbers | None]:
    """Which parameters Muon takes (the kernels of the layers), and which of their axes are inputs and outputs."""

    def axes(path: str, value: Any) -> MuonDimensionNumbers | None:
        if "/layers/" not in path or not path.endswith("/kernel"):
            return None
        first = 0 if re.search(r"/layers/\d", path) else 1  # a stack's layers are so many matrices
        outs = 1 if value.ndim - first == 2 or path.endswith("o/kernel") else 2
        return MuonDimensionNumbers(tuple(range(first + outs, value.ndim)), tuple(range(first, first + outs)))

    return {path: axes(path, value) for path, value in parameters.items()}
