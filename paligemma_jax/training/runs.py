"""A run's folder: what it was asked to do, its log, its checkpoints, its picture."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from paligemma_jax.sharding import hosts
from paligemma_jax.training.batches import Batch
from paligemma_jax.training.config import FinetuneConfig
from paligemma_jax.training.trainer import TrainState

NEW = ".new"  # of a file that is still being written


def settings(config: FinetuneConfig) -> dict[str, Any]:
    """What config.json holds; devices and processes may be others when a run is resumed."""
    return asdict(replace(config, resume=False, mesh=None, hosts=None))


def check_run_folder(config: FinetuneConfig) -> None:
    """ValueError if the folder is no place to begin this run, or to resume it; nothing is written. It may have been moved since it was begun."""
    folder = Path(config.output)
    if config.tensorboard:
        _board()
    if config.resume:
        if not (file := folder / "config.json").is_file():
            raise ValueError(f"{folder} has no run to resume: there is no config.json")
        before, now = json.loads(file.read_text()), settings(config)
        if other := [name for name, value in now.items() if name != "output" and before.get(name) != value]:
            told = ", ".join(f"{name} {before.get(name)!r}, now {now[name]!r}" for name in other)
            raise ValueError(f"{folder} was begun with other settings: {told}; resume with the same")
    elif folder.exists() and any(path.suffix != NEW for path in folder.iterdir()):
        raise ValueError(f"{folder} is not empty: give another --output, or --resume to continue the run there")


class Run:
    """config.json, log.jsonl, samples.jsonl, checkpoints/, loss.png, and tensorboard/ where wanted."""

    def __init__(self, config: FinetuneConfig):
        self.folder = Path(config.output)
        if hosts.is_first_process():
            self.folder.mkdir(parents=True, exist_ok=True)
            if not config.resume:
                _write(self.folder / "config.json", json.dumps(settings(config), indent=2) + "\n")
        hosts.barrier("run")
        self.board: Any = _board()(str(self.folder / "tensorboard")) if config.tensorboard and hosts.is_first_process() else None
        policies, good = ocp.checkpoint_managers, lambda found: -found["validation_loss"]
        best = policies.BestN(get_metric_fn=good, n=1, keep_checkpoints_without_metrics=False)  # without: a kill came while it was removed
        kept = policies.AnyPreservationPolicy([policies.LatestN(config.keep), best])
        # best_fn: or else the metrics are not written, and a run that is resumed would drop its best
        options = ocp.CheckpointManagerOptions(preservation_policy=kept, best_fn=good, enable_async_checkpointing=True)
        self.manager = ocp.CheckpointManager(self.folder.resolve() / "checkpoints", options=options)

    def restore(self, state: TrainState) -> TrainState:
        """The last checkpoint, or `state` where there is none; what was logged after it is dropped."""
        step = self.manager.latest_step()
        for log in (self.folder / "log.jsonl", self.folder / "samples.jsonl"):
            if log.exists() and hosts.is_first_process():
                whole = [line for line in log.read_text().splitlines(keepends=True) if line.endswith("\n")]
                _write(log, "".join(line for line in whole if json.loads(line)["step"] <= (step or 0)))
        if step is None:
            return state
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        return self.manager.restore(step, args=ocp.args.StandardRestore(target))  # type: ignore[return-value]

    def save(self, step: int, state: TrainState, validation_loss: float | None) -> None:
        """Returns as soon as training may go on; the writing goes on beside it, until `finish`."""
        metrics = {"validation_loss": np.inf if validation_loss is None else validation_loss}  # Orbax warns of every save without
        if jax.default_backend() == "cpu":  # there Orbax holds on to the very memory that the next step is given
            state = jax.tree.map(jnp.copy, state)
        self.manager.save(step, args=ocp.args.StandardSave(state), metrics=metrics)

    def finish(self) -> None:
        """Waits for what is being written."""
        self.manager.wait_until_finished()
        if self.board:
            self.board.close()

    def log(self, line: dict[str, Any], name: str = "log.jsonl") -> None:
        if not hosts.is_first_process():
            return
        with (self.folder / name).open("a") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
        if self.board:
            for key, value in line.items():
                if isinstance(value, float):
                    self.board.add_scalar(key, value, line["step"])

    def bad(self, line: dict[str, Any], data: Batch) -> str:
        """Saves the batch; returns what to say."""
        self.finish()
        step = line["step"]
        file = self.folder / f"bad_batch_{step}.npz"
        arrays = {name: getattr(data.inputs, name) for name in ("tokens", "images", "valid", "prefix", "targets")}
        features = None if data.features is None else np.asarray(data.features, np.float32)  # numpy's files have no bfloat16
        arrays |= {"weights": data.weights, "features": features}
        if hosts.is_first_process():
            np.savez(file, **{name: array for name, array in arrays.items() if array is not None})
        last = self.manager.latest_step()
        return (
            f"the loss of step {step} is {line['loss']}, its gradient's norm {line['gradient_norm']}; its batch is in {file}, "
            f"the last checkpoint is of step {last}: lower --learning-rate, or look at it"
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


def _write(file: Path, text: str) -> None:
    """Whole or not at all, whenever the process is killed."""
    new = file.with_suffix(NEW)
    new.write_text(text)
    os.replace(new, file)


def _board() -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise ValueError("to write for TensorBoard, install the extra: pip install 'paligemma-jax[train]'") from None
    return SummaryWriter
