"""Learning rate schedules and optimizers, built from optax."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import optax
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import PyTree
from optax.contrib import MuonDimensionNumbers, muon

from paligemma_jax.training.config import FinetuneConfig
from paligemma_jax.training.ranges import flag

# A transformation, or a function (schedule) -> transformation such as optax.lion.
OwnOptimizer = (
    optax.GradientTransformation | Callable[[optax.Schedule], optax.GradientTransformation]
)
# The options that it replaces; a transformation also has a rate of its own.
REPLACED = "optimizer weight_decay beta1 beta2 vision_rate loraplus_lr_ratio"
VECTORS = r".*/(scale|bias|lora_magnitude)"  # of norms, linear layers and DoRA
SCHEDULE = "learning_rate schedule warmup"


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
    if config.vision_rate == config.loraplus_lr_ratio == 1:
        return optimizer

    def scale(updates: PyTree, _: PyTree) -> PyTree:
        return {path: update * rate_multiplier(config, path) for path, update in updates.items()}

    return optax.chain(optimizer, optax.stateless(scale))


def rate_multiplier(config: FinetuneConfig, path: str) -> float:
    """What the learning rate of a parameter is multiplied by. As in peft's
    `create_loraplus_optimizer`, the ratio of LoRA+ applies to B and to vectors."""
    multiplier = config.vision_rate if path.startswith("vision/") else 1.0
    if path.endswith("/lora_b") or re.fullmatch(VECTORS, path):
        multiplier *= config.loraplus_lr_ratio
    return multiplier


def decay_mask(parameters: Mapping[str, Array]) -> dict[str, bool]:
    """Which parameters are decayed: matrices and tables, not norms, biases and magnitudes."""
    return {path: not re.fullmatch(VECTORS, path) for path in parameters}


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


def own_optimizer(
    optimizer: OwnOptimizer, config: FinetuneConfig, steps: int
) -> tuple[optax.GradientTransformation, optax.Schedule | None]:
    """An optimizer of the user, and its learning rate by step if it is that of the configuration.

    Args:
        optimizer: A transformation, or a function of the schedule of the configuration that returns
            one. It transforms gradients that are averaged and clipped (`config.clip`), as a dict
            path -> float32 array.

    Raises:
        ValueError: It is neither, or options are set that it replaces.
    """
    replaced, name = REPLACED, "optimizer="
    schedule = make_schedule(config, steps)
    if not isinstance(optimizer, optax.GradientTransformation):
        made = optimizer(schedule) if callable(optimizer) else None
        if not isinstance(made, optax.GradientTransformation):
            raise ValueError(
                "optimizer must be an optax.GradientTransformation, or a function of a schedule "
                f"that returns one, got {optimizer!r}"
            )
        optimizer = made
    else:
        replaced, name, schedule = f"{REPLACED} {SCHEDULE}", "optimizer= with its own rate", None
    for field in replaced.split():
        if getattr(config, field) != getattr(FinetuneConfig, field):
            raise ValueError(
                f"{flag(field)} {getattr(config, field)} does not apply to {name}: leave it out"
            )
    return optimizer, schedule


def injected_rate(state: optax.OptState) -> Array | None:
    """The learning rate in the state of `optax.inject_hyperparams`, if there is exactly one."""
    found = optax.tree.get_all_with_path(state, "learning_rate")
    rates = [value for _, value in found if getattr(value, "shape", None) == ()]
    return rates[0] if len(rates) == 1 else None
