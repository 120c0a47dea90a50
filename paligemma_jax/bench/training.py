"""Training steps measured: tokens per second, share of the machine's matrix rate, memory; and against transformers (with peft for LoRA).

The published sizes on an accelerator:

    for model in 3b-224 10b-224; do
        paligemma-jax bench --train all lora qlora --model $model --dtype bfloat16 --batch 8 --remat full --against transformers --json > $model.json
    done
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from statistics import median
from typing import Any

import jax
import numpy as np

from paligemma_jax.bench.generation import (
    BenchConfig,
    Clocked,
    alternate,
    measure_machine,
    program_bytes,
    spread,
)
from paligemma_jax.checkpoints.synthetic import abstract_model_by_name, model_by_name, synthetic_inputs
from paligemma_jax.model.flops import training_flops
from paligemma_jax.processing.processor import Inputs
from paligemma_jax.training.batches import Batch, max_targets
from paligemma_jax.training.config import FinetuneConfig
from paligemma_jax.training.prepare import prepare_model, trainer_shapes
from paligemma_jax.training.trainer import Trainer


def run(plan: BenchConfig) -> dict[str, Any]:
    """Measures; returns {"machine": ..., "training": [...]}, all of it plain numbers, times in seconds. Without repeats it only compiles."""
    dtype = plan.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    machine = measure_machine(dtype)
    rows = [row for name in plan.model for train in plan.train for row in _measure_model(name, train, dtype, plan)]
    for row in rows:
        if "flops_s" in row:
            row["mfu"] = row["flops_s"] / machine["matrix_flops_s"]
    return {"machine": machine, "training": rows}


def _measure_model(name: str, train: str, dtype: str, plan: BenchConfig) -> Iterator[dict[str, Any]]:
    for batch in plan.batch:
        for prompt in plan.prompt:
            config = FinetuneConfig(
                "", "", train="lora" if train == "qlora" else train, quantize="nf4" if train == "qlora" else None, batch_size=batch,
                learning_rate=1e-4, remat=plan.remat, dtype=dtype,
            )  # fmt: skip
            model = model_by_name(name, dtype, plan.depth) if plan.repeats else abstract_model_by_name(name, dtype, plan.depth)
            data = Batch(answering(synthetic_inputs(model.config, batch, prompt + plan.new), plan.new), np.ones(batch, np.float32))
            about = {"model": name, "train": train, "dtype": dtype, "remat": plan.remat, "batch": batch, "tokens": data.inputs.tokens.shape[1]}
            for row in _measure(model, config, data, plan):
                yield about | row


def answering(inputs: Inputs, new: int) -> Inputs:
    """The last `new` tokens of each row as its answer."""
    targets = np.broadcast_to(np.arange(inputs.tokens.shape[1]) >= inputs.tokens.shape[1] - new, inputs.tokens.shape)
    return replace(inputs, targets=targets, prefix=~targets)


def _measure(model: Any, config: FinetuneConfig, data: Batch, plan: BenchConfig) -> Iterator[dict[str, Any]]:
    rows, tokens = data.inputs.tokens.shape
    theirs: dict[str, Clocked] = {}
    for name in plan.against:
        from paligemma_jax.bench.contender import trainer, transformers_model

        theirs[name] = trainer(transformers_model(model), data.inputs, config)
    work = training_flops(model.config, data.inputs.tokens, data.inputs.targets, _names(model, config))
    once, about = compiled(model, config, data, run=plan.repeats > 0)
    if not plan.repeats:
        yield {"by": "paligemma-jax", "flops": work} | about
        return
    times = {name: np.array([rest for _, rest in found.T]) for name, found in alternate({"paligemma-jax": once} | theirs, plan.repeats).items()}
    for name, seconds in times.items():
        row = {"by": name, "step_s": spread(seconds), "tokens_s": spread(rows * tokens / seconds), "flops": work, "flops_s": work / median(seconds)}
        yield row | (about if name == "paligemma-jax" else {"slower": median(seconds / times["paligemma-jax"])})


def _names(model: Any, config: FinetuneConfig) -> list[str]:
    return trainer_shapes(model, config)[0].trainable




def compiled(model: Any, config: FinetuneConfig, data: Batch, run: bool) -> tuple[Callable[[], tuple[float, float]], dict[str, Any]]:
    """The compiled step as something to clock, and what compiling it took and what memory it needs in bytes: arguments, temporaries, in all."""
    trainer, state, frozen = trainer_shapes(model, config)
    start = time.perf_counter()
    program = trainer.step.lower(state, frozen, data, max_targets=max_targets(data)).compile()
    about = {"compile_s": time.perf_counter() - start} | program_bytes(program)
    if not run:
        return lambda: (0.0, 0.0), about
    ready = Trainer(prepare_model(model, config), config, 1000)
    now = [ready.start()]

    def once() -> tuple[float, float]:
        start = time.perf_counter()
        now[0], report = program(now[0], ready.frozen, data)
        assert np.isfinite(report["loss"])
        return 0.0, time.perf_counter() - start

    return once, about


HEADER = (
    "model",
    "train",
    "remat",
    "batch",
    "tokens",
    "by",
    "compile s",
    "step s",
    "tokens/s",
    "MFU",
    "arguments",
    "temporaries",
    "GiB",
)
NOTE = """tokens: of image, prompt and answer, a row. MFU: share of the machine's own matrix rate that the counted FLOPs come to; what is
computed again to save memory does not count. GiB, by the compiler's analysis: arguments are weights, optimizer state and batch.
x: times the speed of the line's contender that paligemma-jax has, each repeat against its neighbour."""


def _spread(values: dict[str, float]) -> str:
    return f"{values['median']:.3g} ({values['min']:.3g} - {values['max']:.3g})"


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """A line of the table."""
    about = (row["model"], row["train"], row["remat"], str(row["batch"]), str(row["tokens"]), row["by"])
    timed = ("", "", "")
    if "step_s" in row:
        faster = f" x{row['slower']:.2f}" if "slower" in row else ""
        timed = (_spread(row["step_s"]), _spread(row["tokens_s"]) + faster, f"{row['mfu']:.0%}")
    memory = tuple(f"{row[name] / 2**30:.2f}" if name in row else "" for name in ("argument_bytes", "temporary_bytes", "memory_bytes"))
    return (*about, f"{row['compile_s']:.1f}" if "compile_s" in row else "", *timed, *memory)
