"""Measure the speed, share of the matrix rate and memory of training steps, also against
transformers (with peft for LoRA).

For the published sizes on an accelerator:

    for model in 3b-224 10b-224; do
        paligemma-jax bench --train all lora qlora --model $model --dtype bfloat16 --batch 8 \
            --remat full --against transformers --json > $model.json
    done
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from statistics import median

import numpy as np

from paligemma_jax.bench import clock
from paligemma_jax.bench.clock import OURS, Record, Run, alternate, spread
from paligemma_jax.bench.config import BenchConfig
from paligemma_jax.bench.roofs import ROOFS, add_shares, roofs
from paligemma_jax.checkpoints.synthetic import (
    abstract_model_by_name,
    model_by_name,
    synthetic_inputs,
)
from paligemma_jax.model.flops import training_flops
from paligemma_jax.model.paligemma import PaliGemma
from paligemma_jax.processing.processor import Inputs
from paligemma_jax.sharding.devices import choose_attention, program_bytes
from paligemma_jax.training.batches import Batch, max_targets
from paligemma_jax.training.config import FinetuneConfig
from paligemma_jax.training.prepare import prepare_model, trainer_shapes
from paligemma_jax.training.trainer import Trainer

MEMORY = ("argument_bytes", "temporary_bytes", "memory_bytes")


def run(config: BenchConfig) -> Record:
    """Measure training steps. Without repeats, only compile them.

    Returns:
        {"machine": ..., "training": [...]}, with times in seconds.
    """
    dtype = config.dtype or clock.default_dtype()
    machine = clock.describe_machine(dtype)
    forms = [choose_attention(form) for form in config.attention or (None,)]
    cases = product(config.model, config.train, forms, config.batch, config.prompt)
    rows = [row for case in cases for row in _measure_case(*case, machine, config)]
    add_shares(rows)
    return {"machine": machine, "training": rows}


def _measure_case(
    name: str, train: str, form: str, batch: int, prompt: int, machine: Record, config: BenchConfig
) -> Iterator[Record]:
    dtype, attention = machine["dtype"], choose_attention(form)
    finetune = FinetuneConfig(
        data="",
        output="",
        train="lora" if train == "qlora" else train,
        quantize="nf4" if train == "qlora" else None,
        batch_size=batch,
        learning_rate=1e-4,
        remat=config.remat,
        dtype=dtype,
        attention=attention,
    )
    make_model = model_by_name if config.repeats else abstract_model_by_name
    model = make_model(name, dtype, config.depth, attention=attention)
    inputs = synthetic_inputs(model.config, batch, prompt + config.new)
    data = Batch(with_targets(inputs, config.new), np.ones(batch, np.float32))
    common = {
        "model": name,
        "train": train,
        "attention": attention,
        "device": machine["device"],
        "dtype": dtype,
        "remat": config.remat,
        "batch": batch,
        "tokens": inputs.tokens.shape[1],
    }
    for row in _measure_step(model, finetune, data, config):
        yield common | row


def with_targets(inputs: Inputs, count: int) -> Inputs:
    """Turn the last `count` tokens of each row into targets."""
    length = inputs.tokens.shape[1]
    targets = np.broadcast_to(np.arange(length) >= length - count, inputs.tokens.shape)
    return replace(inputs, targets=targets, prefix=~targets)


def _measure_step(
    model: PaliGemma, finetune: FinetuneConfig, data: Batch, config: BenchConfig
) -> Iterator[Record]:
    """Yield one row for this model and one for each contender, which run in turn."""
    contenders: dict[str, Run] = {}
    for name in config.against:
        from paligemma_jax.bench.contender import trainer, transformers_model

        contenders[name] = trainer(transformers_model(model), data.inputs, finetune)
    tokens, targets = np.asarray(data.inputs.tokens), np.asarray(data.inputs.targets)
    trainable = trainer_shapes(model, finetune)[0].trainable
    flops = training_flops(model.config, tokens, targets, trainable)
    step, compiled = compile_step(model, finetune, data, config.repeats > 0)
    if step is None:
        yield {"by": OURS, "flops": flops} | compiled
        return
    contenders = {OURS: step, ROOFS: roofs(model.config.dtype)} | contenders
    times = alternate(contenders, config.repeats)
    flop_seconds, _ = times.pop(ROOFS)
    for name, (_, seconds) in times.items():
        slower = {"slower": median(seconds / times[OURS][1])}
        yield {
            "by": name,
            "step_s": spread(seconds),
            "tokens_s": spread(tokens.size / seconds),
            "flops": flops,
            "flops_s": flops / median(seconds),
            "matrix_dtype": model.config.dtype,
            "matrix_flops_s": 1 / flop_seconds.min(),
            **(compiled if name == OURS else slower),
        }


def compile_step(
    model: PaliGemma, config: FinetuneConfig, data: Batch, start: bool
) -> tuple[Run | None, Record]:
    """Compile a training step.

    Returns:
        A function that runs a step, or None without `start`; and the compile time and memory.
    """
    trainer, state, frozen = trainer_shapes(model, config)
    begin = time.perf_counter()
    program = trainer.step.lower(state, frozen, data, max_targets=max_targets(data)).compile()
    compiled: Record = {"compile_s": time.perf_counter() - begin}
    memory = program_bytes(program)
    compiled |= {name: memory[name] for name in MEMORY}
    if not start:
        return None, compiled
    ready = Trainer(prepare_model(model, config), config, 1000)
    state = ready.start()

    def run() -> tuple[float, float]:
        nonlocal state
        begin = time.perf_counter()
        state, report = program(state, ready.frozen, data)
        assert np.isfinite(report["loss"])
        return 0.0, time.perf_counter() - begin

    return run, compiled
