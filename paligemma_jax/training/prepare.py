"""Prepare a checkpoint for training: dtypes, quantization, stacking, LoRA, soft tokens."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
from jax.sharding import Mesh

from paligemma_jax import lora
from paligemma_jax.checkpoints.load import load_model
from paligemma_jax.checkpoints.source import CheckpointSource
from paligemma_jax.model.paligemma import PaliGemma
from paligemma_jax.model.patterns import alternatives, matches, unmatched
from paligemma_jax.model.prefix import initial_prefix, soft_token_count, with_prefix
from paligemma_jax.model.soft_prompt import initial_soft_prompt, with_soft_prompt
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

    is_trainable = partial(matches, config.trainable_pattern)
    if config.dtype == "float64":
        raise ValueError("--dtype must be bfloat16, float32 or float16 to train, got float64")
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
    shapes = parameters(jax.eval_shape(partial(prepare_model, config=config), model))
    saved = config.saved_pattern
    if saved and not any(matches(saved, path, shape) for path, shape in shapes.items()):
        raise ValueError(
            f"--modules-to-save {config.modules_to_save} matches no module, or only modules that "
            "LoRA adapts; paths look like projector or decoder/norm"
        )
    for part in alternatives(config.modules_to_save) if config.modules_to_save else ():
        if unmatched(replace(config, modules_to_save=part).saved_pattern, shapes):
            raise ValueError(
                f"every alternative of --modules-to-save must match a module, got {part!r}; paths "
                "look like projector or decoder/norm"
            )
    for path, codes in shapes.items():
        layer, _, name = path.rpartition("/")
        if name != "codes":
            continue
        if any(is_trainable(f"{layer}/{x}", codes) for x in ("codes", "scale", "kernel", "table")):
            reason = "by --quantize" if config.quantize else f"in --model {config.model}"
            raise ValueError(
                f"--train {config.train} matches {layer}, which is quantized {reason}: quantized "
                "weights cannot be trained, but --train lora adapts them"
            )
    vision = {path: shape for path, shape in shapes.items() if path.startswith("vision/")}
    if config.features and any(is_trainable(path, shape) for path, shape in vision.items()):
        raise ValueError(
            "--features requires a frozen image encoder: choose a --train that excludes it"
        )
    return model


def prepare_model(model: PaliGemma, config: FinetuneConfig, delete: bool = False) -> PaliGemma:
    """Quantize, stack, add LoRA and a soft prompt or a prefix as `config` specifies.

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
    if config.soft_prompt and not soft_token_count(model):
        if config.train == "prefix":
            return with_prefix(model, initial_prefix(model, config.soft_prompt, config.seed))
        vectors = initial_soft_prompt(model, config.soft_prompt, config.seed)
        model = with_soft_prompt(model, vectors)
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
