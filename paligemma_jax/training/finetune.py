"""Fine-tuning from beginning to end: data, model, the loop that survives being stopped, and what comes out."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from convert import peft
from paligemma_jax import lora
from paligemma_jax.checkpoints.load import load_model
from paligemma_jax.checkpoints.save import save_model
from paligemma_jax.checkpoints.source import CheckpointSource, resolve
from paligemma_jax.data.rows import RowSource, count_rows, error_prefix, example_at, read_examples
from paligemma_jax.inference.loading import enable_compilation_cache, make_processor
from paligemma_jax.inference.predictor import Predictor
from paligemma_jax.model.flops import training_flops
from paligemma_jax.model.stack import unstack_model
from paligemma_jax.model.tree import parameters, with_parameters
from paligemma_jax.processing.processor import Processor
from paligemma_jax.sharding import devices, hosts
from paligemma_jax.sharding.arrays import distribute, local_rows, shard_batch
from paligemma_jax.sharding.devices import matrix_rate
from paligemma_jax.sharding.mesh import check_batch_size, resolve_mesh
from paligemma_jax.training.augment import Augment
from paligemma_jax.training.batches import Batch, encode_example, make_batch, prefetch, row_order
from paligemma_jax.training.config import FinetuneConfig
from paligemma_jax.training.features import Features
from paligemma_jax.training.prepare import max_targets, prepare_model
from paligemma_jax.training.runs import Run, check_run_folder
from paligemma_jax.training.trainer import Trainer, TrainState


@hosts.exit_together()
def finetune(config: FinetuneConfig, data: RowSource | None = None, validation: RowSource | None = None) -> Path:
    """Trains as `config` says; returns the folder of the final model, or adapter. ValueError for whatever the user can mend.

    data, validation: rows in the place of those files, by number: lists, grain sources, data sets.
    A run that was stopped, by SIGTERM or anything worse, continues with `resume=True` from its last checkpoint, bit for bit on a CPU.
    Of several processes (`config.hosts`) each opens the images of its rows, holds its shards, and writes them.
    """
    enable_compilation_cache()
    hosts.initialize(config.hosts)
    devices.check_devices()
    source = resolve(config.model)
    if config.lora and source.adapter:
        raise ValueError(f"--model {config.model} is an adapter itself: give its base, {peft.base_checkpoint(source.adapter)}, or train without LoRA to go on from both")
    processor = make_processor(source)
    train, held_out = _rows(config, processor, data, validation)
    steps = config.steps or max(1, round(config.epochs * len(train) / config.batch_size))
    several = "auto" if jax.process_count() > 1 else None
    mesh = resolve_mesh(config.mesh or several, source.config, training=True, rows=config.batch_size // config.accumulate)
    check_batch_size("--batch-size", config.batch_size, config.accumulate, mesh)
    if mesh and len({device.process_index for device in mesh.devices.flat}) < jax.process_count():
        raise ValueError(f"--mesh {config.mesh} leaves out whole processes: it has {mesh.size} of {jax.device_count()} devices")
    if hosts.is_first_process():
        check_run_folder(config)
    model = _loaded(config, source, mesh)
    features = Features(Path(config.features), model, processor.image_size) if config.features else None
    if features:
        features.fill(model, [train, held_out], config.batch_size)
    make = partial(make_batch, processor=processor, size=config.batch_size, length=config.length, features=features, own=local_rows(config.batch_size, mesh))
    lesson = partial(_training_batch, config, partial(make, parts=config.accumulate), train)
    lesson(0)
    with error_prefix("validation"):
        for _ in _whole(make, held_out, config.batch_size) if validation is not None else ():  # those of a file have been read
            pass
    trainer = Trainer(distribute(prepare_model(model, config, delete=True), mesh), config, steps)
    del model
    run = Run(config)  # now, so that a run that cannot start leaves nothing behind
    state = run.restore(trainer.start())
    state, stopped = _loop(trainer, run, state, steps, lesson, make, held_out, processor)
    run.finish()
    if stopped:
        if hosts.is_first_process():
            print(f"stopped after step {int(state.step)}; --resume continues")
        return run.folder
    if hosts.is_first_process():
        run.chart()
    return _save(trainer, state, source, run.folder)


def _rows(config: FinetuneConfig, processor: Processor, data: RowSource | None, validation: RowSource | None) -> tuple[RowSource, RowSource]:
    """Those to learn from and those to measure on."""
    fits = partial(encode_example, processor=processor, length=config.length)
    train = read_examples(config.data, fits) if data is None else data
    held_out = validation if validation is not None else read_examples(config.validation, fits) if config.validation else []
    for name, rows in (("data", train), ("validation", held_out)):
        if count_rows(name, rows) and not any(example_at(rows, i).weight for i in range(len(rows))):
            raise ValueError(f"{name}: every row has weight 0, so there is nothing to learn")
    if not len(train):
        raise ValueError("data has no rows")
    if config.validate_every and not len(held_out):
        raise ValueError(f"--validate-every {config.validate_every} has nothing to measure: give --validation")
    return train, held_out


def _loaded(config: FinetuneConfig, source: CheckpointSource, mesh: Any) -> Any:
    """The model, with what learns in float32; activations and what is frozen are by default bfloat16, whatever the checkpoint's, on a CPU float32."""
    wide = lambda path: bool(re.fullmatch(config.pattern, path))
    dtype = config.dtype or (None if jax.default_backend() == "cpu" else "bfloat16")
    model = load_model(source, dtype, config.numerics, mesh, wide, config.quantize)
    paths = list(parameters(jax.eval_shape(partial(prepare_model, config=config), model)))
    for path in (path.removesuffix("/codes") for path in paths if path.endswith("/codes")):
        if any(wide(f"{path}/{part}") for part in ("codes", "scale", "kernel", "table")):
            why = "--quantize" if config.quantize else f"--model {config.model}"
            raise ValueError(f"--train {config.train}: {why} holds {path} in codes, which do not learn; --train lora adapts them")
    if config.features and any(path.startswith("vision/") and wide(path) for path in paths):
        raise ValueError("--features are those of a frozen image encoder: choose a --train that leaves it out")
    return model




def _loop(trainer: Trainer, run: Run, state: TrainState, steps: int, lesson: Any, make: Any, validation: RowSource, processor: Processor) -> tuple[TrainState, bool]:
    config, first = trainer.config, int(state.step)
    rate = matrix_rate(trainer.model.config.activation_dtype)
    with _sigterm() as asked, tqdm(total=steps, initial=first, unit="step", disable=None if hosts.is_first_process() else True) as bar:
        began = time.perf_counter()
        for step, data in enumerate(prefetch(partial(lesson, step) for step in range(first, steps)), first + 1):
            state, report = trainer.step(state, trainer.frozen, shard_batch(data, trainer.mesh), max_targets=max_targets(data))
            line = {"step": step, **{name: float(value) for name, value in report.items()}}
            seconds = time.perf_counter() - began
            work = training_flops(trainer.model.config, data.inputs.tokens, data.inputs.targets, trainer.trainable, encodes=data.features is None)
            line |= {"tokens_s": float(data.inputs.valid.sum() / seconds), "mfu": work / seconds / rate, "memory_bytes": devices.peak_bytes()}
            if not np.isfinite([line["loss"], line["gradient_norm"]]).all():
                raise ValueError(run.bad(line, data))
            if len(validation) and (step == steps or (config.validate_every and step % config.validate_every == 0)):
                with _kept(run, state, line):
                    line["validation_loss"] = _measure(trainer, state, make, validation)
                    _answer(trainer, state, run, validation, processor)
            run.log(line)
            bar.update()
            bar.set_postfix(loss=f"{line['loss']:.4f}", tokens_s=f"{line['tokens_s']:.0f}", refresh=False)
            stop = hosts.any_process(bool(asked))
            if step == steps or step % config.save_every == 0 or "validation_loss" in line or stop:
                run.save(step, state, line.get("validation_loss"))
            if stop and step < steps:
                return state, True
            began = time.perf_counter()  # waiting for data counts, measuring and saving do not
    return state, False


@contextmanager
def _kept(run: Run, state: TrainState, line: dict[str, Any]) -> Iterator[None]:
    """A measurement that fails does not lose the steps before it. (Several processes would save together, and may not all have failed.)"""
    try:
        yield
    except Exception:
        if jax.process_count() == 1:
            run.log(line)
            run.save(line["step"], state, line.get("validation_loss"))
            run.finish()
        raise


def _training_batch(config: FinetuneConfig, make: Callable[..., Batch], source: RowSource, step: int) -> Batch:
    """What a step learns from, counted from 0: a function of the seed and its number."""
    start = step * config.batch_size
    examples = [example_at(source, int(i)) for i in row_order(len(source), config.seed, start, config.batch_size)]
    if config.augments:
        augment = Augment(config.flip, config.crop, config.color)
        examples = [augment(example, np.random.default_rng((config.seed, start + n))) for n, example in enumerate(examples)]
    return make(examples)


def _whole(make: Callable[..., Batch], source: RowSource, size: int) -> Iterator[Batch]:
    """All rows, as they are."""
    made = lambda start: make([example_at(source, i) for i in range(start, min(start + size, len(source)))])
    return prefetch(partial(made, start) for start in range(0, len(source), size))


def _measure(trainer: Trainer, state: TrainState, make: Any, rows: RowSource) -> float:
    """The loss over all rows, as they are, in the run's own reduction."""
    total, count = 0.0, 0.0
    for data in _whole(make, rows, trainer.config.batch_size):
        loss, weight = trainer.losses(state.average or state.trainable, trainer.frozen, shard_batch(data, trainer.mesh), max_targets=max_targets(data))
        total, count = total + float(loss), count + float(weight)
    return total / max(count, 1e-9)


def _answer(trainer: Trainer, state: TrainState, run: Run, rows: RowSource, processor: Processor) -> None:
    """What the model says to the first rows, into samples.jsonl."""
    examples = [example_at(rows, i) for i in range(min(trainer.config.samples, len(rows)))]
    if not examples:
        return
    predictor = Predictor(trainer.result(state), processor)
    room = processor.context - max(len(row.prompt) for row in processor.rows([list(e.images) for e in examples], [e.prefix for e in examples]))
    answers = predictor.answers([list(e.images) for e in examples], [e.prefix for e in examples], min(64, room), progress=False)
    for example, answer in zip(examples, answers):
        run.log({"step": int(state.step), "prefix": example.prefix, "suffix": example.suffix, "answer": answer.text}, "samples.jsonl")


def _save(trainer: Trainer, state: TrainState, source: CheckpointSource, folder: Path) -> Path:
    """The adapter, if LoRA alone has learned; else, or if asked for, the whole model, merged into the base as it was before it was quantized."""
    config, model = trainer.config, trainer.result(state)
    model = unstack_model(model) if config.layers == "stack" else model
    found, plain = lora.lora_factors(model), {path for path in trainer.trainable if "/lora_" not in path}
    if found and not plain:
        base = config.model if config.model == "tiny" or not Path(config.model).exists() else str(source.weights.resolve())
        if hosts.is_first_process():
            peft.write_adapter(folder / "adapter", found, model.config, base)
        hosts.barrier("adapter")
        if config.export is None:
            return folder / "adapter"
    if found:
        learned = parameters(model)
        before = parameters(base_model := load_model(source, model.config.dtype, config.numerics, trainer.mesh))
        model = with_parameters(base_model, lambda path: learned.get(path, before[path]))
        model = lora.merge_lora(distribute(lora.attach_lora(model, found), trainer.mesh))
    save_model(folder / "model", model, like=source, to=config.export or "jax", force=True)
    return folder / "model"




class _sigterm:
    """A list that is filled when the process is asked to end, by SIGTERM, while inside."""

    def __enter__(self) -> list[int]:
        asked: list[int] = []
        try:
            self.before = signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
        except ValueError:  # not in the main thread
            self.before = None
        return asked

    def __exit__(self, *_: object) -> None:
        if self.before is not None:
            signal.signal(signal.SIGTERM, self.before)
