"""."""

from __future__ import annotations

from typing import Any

import jax

from paligemma_jax import lora
from paligemma_jax.model.stack import stack_model
from paligemma_jax.processing.processor import round_up
from paligemma_jax.quantization.quantize import quantize_model
from paligemma_jax.training.batches import Batch
from paligemma_jax.training.config import FinetuneConfig
from paligemma_jax.training.trainer import Trainer


def prepare_model(model: Any, config: FinetuneConfig, delete: bool = False) -> Any:
    """A model with its layers as a list, as `config` trains it: quantized, stacked, with LoRA. Of arrays, or of shapes inside `jax.eval_shape`.

    delete: the arrays that are stacked.
    """
    model = quantize_model(model, config.quantize) if config.quantize else model
    model = stack_model(model, delete) if config.layers == "stack" else model
    if not config.lora:
        return model
    ranks = {"decoder": config.lora_rank, "vision": config.lora_vision_rank}
    return lora.add_lora(model, ranks, config.lora_alpha, config.rslora, config.lora_dropout, config.lora_target, config.seed)


def max_targets(data: Batch) -> int:
    return round_up(int(data.inputs.targets.sum(axis=1).max()))


def trainer_shapes(model: Any, config: FinetuneConfig) -> tuple[Trainer, Any, Any]:
    """The trainer of a model of arrays or shapes, and the shapes of its state and of what is frozen: nothing is computed."""
    made: list[Trainer] = []

    def make(model: Any) -> Any:
        made.append(Trainer(prepare_model(model, config), config, 1000))
        return made[0].start(), made[0].frozen

    state, frozen = jax.eval_shape(make, model)
    return made[0], state, frozen
