"""Compile the programs of `inference/generate.py` and `training/trainer.py` from shapes alone,
without the chips."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from paligemma_jax.inference import generate
from paligemma_jax.inference.request import make_request
from paligemma_jax.inference.sampling import Greedy
from paligemma_jax.model.paligemma import PaliGemma
from paligemma_jax.model.stack import stack_model
from paligemma_jax.planning.config import PlanConfig
from paligemma_jax.planning.cost import ProgramCost, program_cost
from paligemma_jax.processing.processor import Inputs, round_up
from paligemma_jax.quantization.quantize import quantize_model
from paligemma_jax.sharding.arrays import batch_shapes, shape_struct, sharded_shapes
from paligemma_jax.sharding.compiled import mesh_jit
from paligemma_jax.training.batches import Batch
from paligemma_jax.training.config import FinetuneConfig
from paligemma_jax.training.prepare import trainer_shapes


def training_programs(
    config: PlanConfig, model: PaliGemma, mesh: Mesh
) -> Iterator[tuple[str, ProgramCost]]:
    """Compile the training step."""
    finetune = FinetuneConfig(
        data="",
        output="",
        train="lora" if config.lora else "all",
        lora_rank=config.lora or 16,
        quantize=config.quantize,
        batch_size=config.rows,
        remat=config.remat,
        accumulate=config.accumulate,
        optimizer=config.optimizer,
        dtype=config.dtype,
        layers=config.layers or "stack",
    )
    trainer, state, frozen = trainer_shapes(model, finetune)
    trainer.mesh = mesh
    batch = batch_shapes(jax.eval_shape(partial(_zero_batch, config, model)), mesh)
    state, frozen = sharded_shapes((state, frozen), mesh)
    targets = round_up(config.new)
    _, cost = _compile(config, trainer.step, state, frozen, batch, max_targets=targets)
    yield "step", cost


def generation_programs(
    config: PlanConfig, model: PaliGemma, mesh: Mesh
) -> Iterator[tuple[str, ProgramCost]]:
    """Compile the image encoder, the prefill and the decode loop (counted as one step)."""
    if config.quantize:
        model = jax.eval_shape(partial(quantize_model, quantization=config.quantize), model)
    if config.layers == "stack":
        model = jax.eval_shape(partial(stack_model, delete=False), model)
    model = sharded_shapes(model, mesh)
    batch = jax.eval_shape(partial(_zero_batch, config, model))
    inputs, images = replace(batch.inputs, images=None), batch.inputs.images
    images = jax.ShapeDtypeStruct((config.rows, *images.shape[2:]), images.dtype)
    request = jax.eval_shape(partial(make_request, model, config.rows))
    encode, cost = _compile(config, generate.encode_images, model, images)
    yield "encode", cost
    features = encode.out_info
    features = jax.ShapeDtypeStruct((config.rows, 1, *features.shape[1:]), features.dtype)
    slots = inputs.tokens.shape[1] + round_up(config.new)
    prefill, cost = _compile(
        config, generate.prefill, model, inputs, features, request, slots=slots, sampler=Greedy()
    )
    yield "prefill", cost
    state = jax.tree.map(shape_struct, prefill.out_info, prefill.output_shardings)
    limit, size = jax.ShapeDtypeStruct((), jnp.int32), round_up(config.new)
    _, cost = _compile(
        config, generate.decode, model, state, request, limit, size=size, sampler=Greedy()
    )
    yield "decode", cost


def _zero_batch(config: PlanConfig, model: PaliGemma) -> Batch:
    """A batch with one image per row."""
    vision = model.config.vision
    tokens = jnp.zeros((config.rows, round_up(vision.num_patches + config.text)), jnp.int32)
    images = jnp.zeros((config.rows, 1, vision.image_size, vision.image_size, 3))
    mask = tokens > 0
    inputs = Inputs(tokens, images, valid=mask, prefix=mask, targets=mask)
    return Batch(inputs, weights=jnp.zeros(config.rows))


def _compile(
    config: PlanConfig, function: mesh_jit, *args: object, **static: object
) -> tuple[jax.stages.Compiled, ProgramCost]:
    start = time.perf_counter()
    program = function.lower(*args, **static).compile()
    return program, program_cost(program, config, time.perf_counter() - start)
