"""The directory of a run: configuration, logs, checkpoints, loss curve."""

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

TEMPORARY = ".new"  # suffix of files that are still being written
LogLine = dict[str, Any]  # JSON values, always with "step"


def settings(config: FinetuneConfig) -> dict[str, Any]:
    """The content of config.json. Devices and processes may change when a run is resumed."""
    return asdict(replace(config, resume=False, mesh=None, hosts=None))


def check_run_folder(config: FinetuneConfig) -> None:
    """Check that a run can start, or resume, in its directory. Nothing is written.

    Raises:
        ValueError: The directory is not empty or, to resume, has no run or one with other settings.
            (The directory may have been moved.)
    """
    folder = Path(config.output)
    if config.tensorboard:
        _summary_writer()
    if config.resume:
        file = folder / "config.json"
        if not file.is_file():
            raise ValueError(f"{folder} has no run to resume: config.json is missing")
        before, now = json.loads(file.read_text()), settings(config)
        changes = [
            f"{name} {before.get(name)!r}, now {value!r}"
            for name, value in now.items()
            if name != "output" and before.get(name) != value
        ]
        if changes:
            raise ValueError(
                f"{folder} was started with other settings: {', '.join(changes)}; "
                "resume with the same settings"
            )
    elif folder.exists() and any(path.suffix != TEMPORARY for path in folder.iterdir()):
        raise ValueError(
            f"{folder} is not empty: choose another --output, or continue its run with --resume"
        )


class Run:
    """Writes config.json, log.jsonl, samples.jsonl, checkpoints/, loss.png and tensorboard/."""

    def __init__(self, config: FinetuneConfig):
        self.folder = Path(config.output)
        self.writer = None
        if hosts.is_first_process():
            self.folder.mkdir(parents=True, exist_ok=True)
            if not config.resume:
                text = json.dumps(settings(config), indent=2) + "\n"
                _write_atomically(self.folder / "config.json", text)
            if config.tensorboard:
                self.writer = _summary_writer()(str(self.folder / "tensorboard"))
        hosts.barrier("run")
        directory = self.folder.resolve() / "checkpoints"
        self.manager = ocp.CheckpointManager(directory, options=_checkpoint_options(config.keep))

    def restore(self, state: TrainState) -> TrainState:
        """The last checkpoint, or `state` if there is none. Drops log lines of later steps."""
        step = self.manager.latest_step()
        if hosts.is_first_process():
            for name in ("log.jsonl", "samples.jsonl"):
                _truncate_log(self.folder / name, step or 0)
        if step is None:
            return state
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        return self.manager.restore(step, args=ocp.args.StandardRestore(target))  # type: ignore[return-value]

    def save(self, step: int, state: TrainState, validation_loss: float | None) -> None:
        """Start to save a checkpoint. Writing continues in the background, until `finish`."""
        # inf: Orbax warns about every checkpoint without metrics.
        metrics = {"validation_loss": np.inf if validation_loss is None else validation_loss}
        if jax.default_backend() == "cpu":  # Orbax reads the memory that the next step reuses
            state = jax.tree.map(jnp.copy, state)
        self.manager.save(step, args=ocp.args.StandardSave(state), metrics=metrics)

    def finish(self) -> None:
        """Wait until everything is written."""
        self.manager.wait_until_finished()
        if self.writer:
            self.writer.close()

    def log(self, line: LogLine, name: str = "log.jsonl") -> None:
        if not hosts.is_first_process():
            return
        with (self.folder / name).open("a") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
        if self.writer:
            for key, value in line.items():
                if isinstance(value, float):
                    self.writer.add_scalar(key, value, line["step"])

    def save_bad_batch(self, line: LogLine, batch: Batch) -> str:
        """Save the batch of a step whose loss or gradient is not finite; return the error."""
        self.finish()
        file = self.folder / f"bad_batch_{line['step']}.npz"
        arrays = vars(batch.inputs) | {"weights": batch.weights, "features": batch.features}
        arrays = {name: array for name, array in arrays.items() if array is not None}
        if "features" in arrays:  # .npz files do not support bfloat16
            arrays["features"] = np.asarray(arrays["features"], np.float32)
        if hosts.is_first_process():
            np.savez(file, **arrays)
        return (
            f"loss {line['loss']} and gradient norm {line['gradient_norm']} at step {line['step']} "
            f"must be finite; its batch is saved in {file}, the last checkpoint is of step "
            f"{self.manager.latest_step()}. Lower --learning-rate, or inspect the batch"
        )

    def plot_losses(self) -> None:
        """Write loss.png, if matplotlib is installed."""
        try:
            from matplotlib.figure import Figure
        except ImportError:
            return
        lines = [json.loads(line) for line in (self.folder / "log.jsonl").read_text().splitlines()]
        figure = Figure((8, 4.5), layout="constrained")
        axes = figure.subplots()
        for name, marker in (("loss", None), ("validation_loss", "o")):
            steps = [line["step"] for line in lines if name in line]
            losses = [line[name] for line in lines if name in line]
            if steps:
                axes.plot(steps, losses, marker=marker, label=name.replace("_", " "))
        axes.set(xlabel="step", ylabel="loss (nats per token)")
        axes.legend(frameon=False)
        figure.savefig(self.folder / "loss.png", dpi=120)


def _checkpoint_options(keep: int) -> ocp.CheckpointManagerOptions:
    """Keep the last checkpoints, and the best by validation loss."""

    def score(metrics: dict[str, float]) -> float:
        return -metrics["validation_loss"]

    policies = ocp.checkpoint_managers
    # A checkpoint without metrics was being removed when the process was killed.
    best = policies.BestN(get_metric_fn=score, n=1, keep_checkpoints_without_metrics=False)
    return ocp.CheckpointManagerOptions(
        preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), best]),
        best_fn=score,  # without it, metrics are not written and a resumed run would lose its best
        enable_async_checkpointing=True,
    )


def _truncate_log(file: Path, step: int) -> None:
    """Drop the lines of steps after `step`, and an incomplete last line."""
    if file.exists():
        lines = file.read_text().splitlines(keepends=True)
        complete = [line for line in lines if line.endswith("\n")]
        kept = [line for line in complete if json.loads(line)["step"] <= step]
        _write_atomically(file, "".join(kept))


def _write_atomically(file: Path, text: str) -> None:
    temporary = file.with_suffix(TEMPORARY)
    temporary.write_text(text)
    os.replace(temporary, file)


def _summary_writer() -> Any:  # the class; tensorboardX has no types
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise ValueError(
            "--tensorboard requires the train extra: pip install 'paligemma-jax[train]'"
        ) from None
    return SummaryWriter
