"""Prepare a checkpoint for training: dtypes, quantization, stacking, LoRA."""

from __future__ import annotations

from functools import partial

import jax
from jax.sharding import Mesh

from paligemma_jax import lora
from paligemma_jax.checkpoints.load import load_model
from paligemma_jax.checkpoints.source import CheckpointSource
from paligemma_jax.model.paligemma import PaliGemma
from paligemma_jax.model.stack import stack_model
from paligemma_jax.model.tree import parameters
from paligemma_jax.quantization.quantize import quantize_model
from paligemma_jax.training.config import FinetuneConfig
from paligemma_jax.training.trainer import Parameters, Trainer, TrainState


def load_trainable(
    config: FinetuneConfig, source: CheckpointSource, mesh: Mesh | None
) -> PaliGemma:
    """Load the model of a run, with its trainable parameters in float32.

    Raises:
        ValueError: The parameters to train are quantized, or are those of an image encoder whose
            features are cached.
    """

    is_trainable = partial(config.matches, config.trainable_pattern)
    dtype = config.dtype or (None if jax.default_backend() == "cpu" else "bfloat16")
    model = load_model(
        source,
        dtype,
        config.numerics,
        mesh,
        keep_float32=is_trainable,
        quantize=config.quantize,
        attention=config.attention,
    )
    paths = list(parameters(jax.eval_shape(partial(prepare_model, config=config), model)))
    if config.saved_pattern and not any(config.matches(config.saved_pattern, p) for p in paths):
        raise ValueError(
            f"--modules-to-save {config.modules_to_save} matches no module, or only modules that "
            "LoRA adapts; paths look like projector or decoder/norm"
        )
    for layer in (path.removesuffix("/codes") for path in paths if path.endswith("/codes")):
        if any(is_trainable(f"{layer}/{name}") for name in ("codes", "scale", "kernel", "table")):
            reason = "by --quantize" if config.quantize else f"in --model {config.model}"
            raise ValueError(
                f"--train {config.train} matches {layer}, which is quantized {reason}: quantized "
                "weights cannot be trained, but --train lora adapts them"
            )
    if config.features and any(path.startswith("vision/") and is_trainable(path) for path in paths):
        raise ValueError(
            "--features requires a frozen image encoder: choose a --train that excludes it"
        )
    return model


def prepare_model(model: PaliGemma, config: FinetuneConfig, delete: bool = False) -> PaliGemma:
    """Quantize, stack and add LoRA as `config` specifies.

    Args:
        model: Model of arrays, or of shapes inside `jax.eval_shape`, with its layers as a list.
        delete: Free the arrays of the list when stacking.
    """
    if config.quantize:
        model = quantize_model(model, config.quantize)
    if config.layers == "stack":
        model = stack_model(model, delete)
    if config.lora:
        model = lora.add_lora(
            model,
            {"decoder": config.lora_rank, "vision": config.lora_vision_rank},
            config.lora_alpha,
            config.rslora,
            config.lora_dropout,
            config.lora_target,
            config.seed,
            config.dora,
        )
    return model


def trainer_shapes(
    model: PaliGemma, config: FinetuneConfig
) -> tuple[Trainer, TrainState, Parameters]:
    """A trainer, and the shapes of its state and frozen parameters. Nothing is computed."""
    trainers: list[Trainer] = []

    def start(model: PaliGemma) -> tuple[TrainState, Parameters]:
        trainers.append(Trainer(prepare_model(model, config), config, 1000))
        return trainers[0].start(), trainers[0].frozen

    state, frozen = jax.eval_shape(start, model)
    return trainers[0], state, frozen
