"""Fine-tuning: one compiled step over parameters by path, and the run around it that survives being stopped."""

from __future__ import annotations

import json
import re
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax import Array
from tqdm import tqdm

from paligemma_jax import checkpoint
from paligemma_jax.inference.predictor import keep_programs, make_processor
from paligemma_jax.model.layers import parameters, remat, with_parameters
from paligemma_jax.model.paligemma import PaliGemma
from paligemma_jax.synthetic import stacked
from paligemma_jax.training.config import Finetune
from paligemma_jax.training.data import BUCKET, Batch, Example, Rows, ahead, batch, make_example, order, read
from paligemma_jax.training.losses import answer_loss
from paligemma_jax.training.optimizers import make_optimizer

Parameters = dict[str, Array]
Loss = Callable[[Any, Any, int], tuple[Array, Array]]  # of model, batch and `longest`: the sum of losses, and what to divide it by


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """What a step changes, and so what a checkpoint holds."""

    step: Array  # int32: steps done
    learns: Parameters  # float32
    optimizer: Any
    average: Parameters  # of `learns`; empty without --ema


class Trainer:
    """The model split into what learns and what is frozen, and the compiled functions over them.

    `loss` is by default that of `config` on a `Batch`; with another, the model and the batch can be any pytrees.
    """

    def __init__(self, model: Any, config: Finetune, steps: int, loss: Loss | None = None):
        self.model, self.config, self.loss = model, config, loss or partial(_answer_loss, config)
        values = parameters(model)
        self.names = [path for path in values if re.fullmatch(config.pattern, path)]
        if not self.names:
            raise ValueError(f"--train {config.train!r} matches no parameter; paths look like decoder/layers/3/attention/q/kernel")
        self.frozen = {path: value for path, value in values.items() if path not in set(self.names)}
        self.optimizer = make_optimizer(config, steps)
        self.step = jax.jit(self._step, static_argnames="longest", donate_argnames="state")
        self.losses = jax.jit(self._losses, static_argnames="longest")

    def start(self) -> State:
        values = parameters(self.model)
        learns = {path: jnp.array(values[path], jnp.float32) for path in self.names}
        return State(jnp.int32(0), learns, self.optimizer.init(learns), jax.tree.map(jnp.copy, learns) if self.config.ema else {})

    def filled(self, learns: Parameters, frozen: Parameters) -> Any:
        return with_parameters(self.model, (frozen | learns).__getitem__)

    def result(self, state: State) -> Any:
        """The model as measured and saved: with the average, where there is one."""
        return self.filled(state.average or state.learns, self.frozen)

    def _losses(self, learns: Parameters, frozen: Parameters, batch: Batch, longest: int) -> tuple[Array, Array]:
        with remat(self.config.remat):
            return self.loss(self.filled(learns, frozen), batch, longest)

    def _step(self, state: State, frozen: Parameters, batch: Batch, longest: int) -> tuple[State, dict[str, Array]]:
        """One update. The parts of the batch add up their sums, divided once: the gradient is that of the whole."""
        parts = jax.tree.map(lambda a: a.reshape(self.config.accumulate, -1, *a.shape[1:]), batch)

        def add(total: Any, part: Batch) -> tuple[Any, None]:
            found = jax.value_and_grad(self._losses, has_aux=True)(state.learns, frozen, part, longest)
            return jax.tree.map(jnp.add, total, found), None

        zero = (jnp.float32(0), jnp.float32(0)), jax.tree.map(jnp.zeros_like, state.learns)
        ((loss, count), gradient), _ = jax.lax.scan(add, zero, parts)
        count = jnp.maximum(count, 1e-9)
        loss, gradient = loss / count, jax.tree.map(lambda g: g / count, gradient)
        updates, optimizer = self.optimizer.update(gradient, state.optimizer, state.learns)
        learns: Any = optax.apply_updates(state.learns, updates)
        average = optax.incremental_update(learns, state.average, 1 - self.config.ema) if self.config.ema else {}
        new = State(state.step + 1, learns, optimizer, average)  # type: ignore[arg-type]
        new = jax.tree.map(partial(jnp.where, jnp.isfinite(loss)), new, state)  # a loss that is not a number changes nothing
        return new, {"loss": loss, "gradient_norm": optax.tree.norm(gradient)}


def _answer_loss(config: Finetune, model: PaliGemma, batch: Batch, longest: int) -> tuple[Array, Array]:
    return answer_loss(model, batch.inputs, batch.weights, longest, reduction=config.reduction, smoothing=config.label_smoothing)


def finetune(config: Finetune, data: Rows | None = None, validation: Rows | None = None) -> Path:
    """Trains as `config` says; returns the folder of the final model. ValueError for whatever the user can mend.

    data, validation: rows in the place of those files, by number: lists, grain sources, data sets.
    A run that was stopped, by SIGTERM or anything worse, continues with `resume=True` from its last checkpoint, bit for bit on a CPU.
    """
    keep_programs()
    source = checkpoint.resolve(config.model)
    processor = make_processor(source)
    train = data or read(config.data)
    validation = validation or (read(config.validation) if config.validation else [])
    steps = config.steps or max(1, round(config.epochs * len(train) / config.batch_size))
    run = Run(config)  # after the reading, so that a run that cannot start leaves nothing behind
    model = checkpoint.load_model(source, config.dtype, config.numerics, wide=lambda path: bool(re.fullmatch(config.pattern, path)))
    trainer = Trainer(stacked(model) if config.layers == "stack" else model, config, steps)
    state = run.restore(trainer.start())
    make = partial(batch, processor=processor, size=config.batch_size, length=config.length)
    state, stopped = _train(trainer, run, state, steps, make, train, validation)
    if stopped:
        print(f"stopped after step {int(state.step)}; --resume continues")
        return run.folder
    checkpoint.save(run.folder / "model", trainer.result(state), like=source, to=config.export, force=True)
    run.chart()
    return run.folder / "model"


def _train(trainer: Trainer, run: Run, state: State, steps: int, make: Any, train: Rows, validation: Rows) -> tuple[State, bool]:
    config, first = trainer.config, int(state.step)

    def batches() -> Iterator[Any]:
        for step in range(first, steps):
            rows = order(len(train), config.seed, step * config.batch_size, config.batch_size)
            yield partial(_made, make, train, rows)

    with _sigterm() as asked, tqdm(total=steps, initial=first, unit="step", disable=None) as bar:
        for step, data in enumerate(ahead(batches()), first + 1):
            began = time.perf_counter()
            state, report = trainer.step(state, trainer.frozen, data, longest=_longest(data))
            line = {"step": step, **{name: float(value) for name, value in report.items()}}
            line["tokens_s"] = data.inputs.valid.sum() / (time.perf_counter() - began)
            if not np.isfinite(line["loss"]):
                raise ValueError(run.bad(step, line["loss"], data))
            measure = len(validation) and (step == steps or (config.validate_every and step % config.validate_every == 0))
            if measure:
                line["validation_loss"] = _measure(trainer, state, make, validation)
            run.log(line)
            bar.update()
            bar.set_postfix(loss=f"{line['loss']:.4f}", tokens_s=f"{line['tokens_s']:.0f}", refresh=False)
            if step == steps or step % config.save_every == 0 or asked:
                run.save(step, state, line.get("validation_loss"))
            if asked and step < steps:
                return state, True
    return state, False


def _made(make: Callable[[list[Example]], Batch], source: Rows, rows: Any) -> Batch:
    return make([make_example(source[int(i)], int(i)) for i in rows])


def _measure(trainer: Trainer, state: State, make: Any, rows: Rows) -> float:
    """The loss over all rows, in the run's own reduction and without label smoothing's effect on the weights."""
    size, total, count = trainer.config.batch_size, 0.0, 0.0
    for data in ahead(partial(_made, make, rows, range(i, min(i + size, len(rows)))) for i in range(0, len(rows), size)):
        loss, weight = trainer.losses(state.average or state.learns, trainer.frozen, data, longest=_longest(data))
        total, count = total + float(loss), count + float(weight)
    return total / max(count, 1e-9)


def _longest(data: Batch) -> int:
    return -(-int(data.inputs.targets.sum(axis=1).max()) // BUCKET) * BUCKET


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


class Run:
    """A run's folder: config.json, log.jsonl, checkpoints/, loss.png."""

    def __init__(self, config: Finetune):
        self.folder = Path(config.output)
        settings, file = asdict(replace(config, resume=False)), self.folder / "config.json"
        if config.resume:
            if not file.is_file():
                raise ValueError(f"{self.folder} has no run to resume: there is no config.json")
            before = json.loads(file.read_text())
            if other := [name for name, value in settings.items() if before.get(name) != value]:
                told = ", ".join(f"{name} {before.get(name)!r}, now {settings[name]!r}" for name in other)
                raise ValueError(f"{self.folder} was begun with other settings: {told}; resume with the same")
        elif self.folder.exists() and any(self.folder.iterdir()):
            raise ValueError(f"{self.folder} is not empty: give another --output, or --resume to continue the run there")
        self.folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(settings, indent=2) + "\n")
        policies = ocp.checkpoint_managers
        best = policies.BestN(get_metric_fn=lambda found: -found["validation_loss"], n=1, keep_checkpoints_without_metrics=False)
        kept = policies.AnyPreservationPolicy([policies.LatestN(config.keep), best])
        options = ocp.CheckpointManagerOptions(preservation_policy=kept)
        self.manager = ocp.CheckpointManager(self.folder.resolve() / "checkpoints", options=options)

    def restore(self, state: State) -> State:
        """The last checkpoint, or `state` where there is none; log lines from after it are dropped."""
        step, log = self.manager.latest_step(), self.folder / "log.jsonl"
        if log.exists():
            whole = [line for line in log.read_text().splitlines(keepends=True) if line.endswith("\n")]
            log.write_text("".join(line for line in whole if json.loads(line)["step"] <= (step or 0)))
        if step is None:
            return state
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        return self.manager.restore(step, args=ocp.args.StandardRestore(target))  # type: ignore[return-value]

    def save(self, step: int, state: State, validation_loss: float | None) -> None:
        metrics = None if validation_loss is None else {"validation_loss": validation_loss}
        self.manager.save(step, args=ocp.args.StandardSave(state), metrics=metrics)
        self.manager.wait_until_finished()

    def log(self, line: dict[str, Any]) -> None:
        with (self.folder / "log.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")

    def bad(self, step: int, loss: float, data: Batch) -> str:
        """Saves the batch; returns what to say."""
        file = self.folder / f"bad_batch_{step}.npz"
        np.savez(file, weights=data.weights, **{name: getattr(data.inputs, name) for name in ("tokens", "images", "valid", "prefix", "targets")})
        last = self.manager.latest_step()
        return (
            f"the loss of step {step} is {loss}; its batch is in {file}, the last checkpoint is of step {last}: lower --learning-rate, or look at it"
        )

    def chart(self) -> None:
        """loss.png, where matplotlib is installed."""
        try:
            from matplotlib.figure import Figure
        except ImportError:
            return
        lines = [json.loads(line) for line in (self.folder / "log.jsonl").read_text().splitlines()]
        figure = Figure((8, 4.5), layout="constrained")
        axes = figure.subplots()
        for name in ("loss", "validation_loss"):
            if points := [(line["step"], line[name]) for line in lines if name in line]:
                axes.plot(*zip(*points), marker="o" if name == "validation_loss" else None, label=name.replace("_", " "))
        axes.set(xlabel="step", ylabel="loss (nats per token)")
        axes.legend(frameon=False)
        figure.savefig(self.folder / "loss.png", dpi=120)
