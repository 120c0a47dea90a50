"""Fine-tuning: data and model, a training loop that can be interrupted, and the result."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
from jax.sharding import Mesh

from paligemma_jax.checkpoints.source import CheckpointSource, resolve
from paligemma_jax.data.rows import RowSource, error_prefix
from paligemma_jax.inference.loading import enable_compilation_cache, make_processor
from paligemma_jax.processing.processor import Processor
from paligemma_jax.sharding import devices, hosts
from paligemma_jax.sharding.arrays import distribute, local_rows
from paligemma_jax.sharding.mesh import check_batch_size, resolve_mesh
from paligemma_jax.training.adapters import check_adapter
from paligemma_jax.training.batches import Batcher, max_targets, training_batch
from paligemma_jax.training.callbacks import Callback, check_callbacks
from paligemma_jax.training.checkpointing import Checkpoints
from paligemma_jax.training.config import FinetuneConfig
from paligemma_jax.training.digest import rows_digest
from paligemma_jax.training.export import save_best, save_result
from paligemma_jax.training.features import FeatureCache
from paligemma_jax.training.loop import train
from paligemma_jax.training.loss_function import LogitsLoss, LossFunction
from paligemma_jax.training.measures import MetricFunction, check_measures, criterion, make_measures
from paligemma_jax.training.objective import Objective
from paligemma_jax.training.optimizers import OwnOptimizer
from paligemma_jax.training.prepare import load_trainable, prepare_model
from paligemma_jax.training.resuming import check_same_optimizer, warn_of_longer_schedule
from paligemma_jax.training.rows import read_rows
from paligemma_jax.training.runs import Run, RunContent, check_run_folder
from paligemma_jax.training.trainer import Trainer
from paligemma_jax.training.validation import Validation


@hosts.exit_together()
def finetune(
    config: FinetuneConfig,
    data: RowSource | None = None,
    validation: RowSource | None = None,
    *,
    loss: LossFunction | LogitsLoss | None = None,
    optimizer: OwnOptimizer | None = None,
    callbacks: Sequence[Callback] = (),
    metrics: Sequence[str | MetricFunction] = (),
    objective: Objective | None = None,
) -> Path:
    """Fine-tune a model.

    A run that was interrupted, by SIGTERM or a crash, continues from its last checkpoint with
    `resume=True`; on a CPU the result is the same bit for bit. In a multi-process run
    (`config.hosts`), each process opens the images of its own rows and writes its own shards.

    Args:
        config: Configuration of the run.
        data: Training rows instead of the file `config.data`: a list, a data set or a grain source
            with rows by index.
        validation: Validation rows instead of the file `config.validation`.
        loss: A function, of a form of `make_loss`, instead of the cross entropy of the answers.
        optimizer: An optax transformation, or a function (schedule) -> transformation such as
            `optax.lion`, instead of `config.optimizer`. `clip`, `ema` and `accumulate` still apply;
            other options of optimizers are refused.
        callbacks: Functions of a `StepEvent`, called after each step; one that returns True ends
            the run. If one fails, a checkpoint is saved first.
        metrics: Metrics of generated answers, besides `config.metric`: names, or functions
            (answers, all correct answers of each) -> score. A function with the attribute
            `better = "lower"` improves downwards. The first metric decides on best/.
        objective: What to learn from, such as `GRPO`; by default the suffixes.

    Returns:
        The directory of the final model or adapter; of the run, if it was stopped by SIGTERM.

    Raises:
        ValueError: The configuration, the data, the model or a function is not usable, or the loss
            is not finite.
    """
    enable_compilation_cache()
    hosts.initialize(config.hosts)
    devices.check_devices()
    source = resolve(config.model, base=config.base)
    if source.note and hosts.is_first_process():
        print(f"paligemma-jax: {source.note}", file=sys.stderr)
    soft_tokens = source.config.soft_tokens(check_adapter(config, source))
    processor = replace(make_processor(source), soft_tokens=soft_tokens)
    _check_sizes(config, processor)
    check_callbacks(callbacks)
    measures = make_measures(config.metric, metrics, source.codec_file)
    rows, validation_rows = read_rows(config, processor, data, validation)
    if objective:
        objective.check(config, rows)
        if loss is not None:
            raise ValueError("loss must be left out with an objective, which has its own")
    steps = _total_steps(config, len(rows))
    mesh = _resolve_mesh(config, source)
    form = devices.choose_attention(config.attention)
    names = [measure.name for measure in measures]
    digests = rows_digest(rows), rows_digest(validation_rows)
    aim = objective.settings() if objective else None
    content = RunContent(form, steps, *digests, names, aim)
    steps_before = check_run_folder(config, content) if hosts.is_first_process() else None
    model = load_trainable(config, source, mesh)
    features = None
    if config.features:
        features = FeatureCache(Path(config.features), model, processor)
        features.fill(model, [rows, validation_rows], config.batch_size)
    own_rows = local_rows(config.batch_size, mesh)
    batcher = Batcher(processor, config.batch_size, config.length, own_rows, features)
    make_batch = partial(training_batch, config, batcher, rows)
    first = make_batch(0)  # raises errors in the data before anything is written
    check_measures(measures, validation_rows)
    if validation is not None:  # rows of a file were checked while reading it
        with error_prefix("validation"):
            for _ in batcher.in_order(validation_rows):
                pass
    model = distribute(prepare_model(model, config, delete=True), mesh)
    trainer = Trainer(model, config, steps, objective.loss if objective else loss, optimizer)
    del model
    state = trainer.start()
    if loss is not None:
        trainer.check_loss(state, first, max_targets(first))
    rollouts = objective.start(trainer, state, processor, rows) if objective else None
    check_same_optimizer(Path(config.output), state)
    best = criterion(measures)
    run, checkpoints = Run(config, content), Checkpoints(Path(config.output), config.keep, best)
    state = checkpoints.restore(state)
    run.rewind(int(state.step))
    warn_of_longer_schedule(config, steps_before, steps, int(state.step))
    validate = Validation(trainer, run, batcher, validation_rows, measures, rollouts)
    make = rollouts or make_batch
    state, ended = train(trainer, run, checkpoints, state, steps, make, validate, callbacks)
    checkpoints.finish()
    run.close()
    if not ended:
        if hosts.is_first_process():
            print(f"stopped after step {int(state.step)}; continue with --resume")
        return run.folder
    if hosts.is_first_process():
        run.plot()
    result = save_result(trainer, state, source, run.folder)
    save_best(trainer, state, checkpoints, source, run.folder)
    return result


def _check_sizes(config: FinetuneConfig, processor: Processor) -> None:
    if config.length and config.length > processor.context:
        raise ValueError(
            f"--length must be at most {processor.context}, the context of the model, "
            f"got {config.length}"
        )
    needed = config.batch_size * 4 * 3 * processor.image_size**2
    memory = devices.host_memory_bytes()
    if needed > memory:
        raise ValueError(
            f"--batch-size {config.batch_size}: the images of a batch need {needed / 1e9:,.0f} GB, "
            f"but this host has {memory / 1e9:,.0f} GB"
        )


def _total_steps(config: FinetuneConfig, rows: int) -> int:
    if config.steps:
        return config.steps
    steps = config.epochs * rows / config.batch_size
    if not steps < 2**31:
        raise ValueError(f"--epochs {config.epochs} is more than 2**31 steps; give --steps")
    return max(1, round(steps))


def _resolve_mesh(config: FinetuneConfig, source: CheckpointSource) -> Mesh | None:
    """The mesh of the run; in a multi-process run, of all processes."""
    several = jax.process_count() > 1
    rows = config.batch_size // config.accumulate
    mesh = resolve_mesh(
        config.mesh or ("auto" if several else None), source.config, training=True, rows=rows
    )
    check_batch_size("--batch-size", config.batch_size, config.accumulate, mesh)
    if mesh and len({d.process_index for d in mesh.devices.flat}) < jax.process_count():
        raise ValueError(
            f"--mesh must include devices of every process, got {config.mesh}: {mesh.size} of "
            f"{jax.device_count()} devices"
        )
    return mesh
