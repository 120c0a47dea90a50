"""The directory of a run: configuration, logs, loss curve."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from convert.files import user_path
from convert.typed_json import Count, Positive, check, decode, load_json
from paligemma_jax.checkpoints.runs import CONFIG, LOG
from paligemma_jax.data.settings import check_settings
from paligemma_jax.sharding import hosts
from paligemma_jax.training.batches import Batch
from paligemma_jax.training.config import FinetuneConfig
from paligemma_jax.training.loggers import LOGGERS, Logger, load_package

TEMPORARY = ".new"  # suffix of files that are still being written
SAMPLES = "samples.jsonl"
LogLine = dict[str, Any]  # JSON values, always with "step"


class LogEntry(msgspec.Struct):
    """What is read from a line of log.jsonl or samples.jsonl."""

    step: Count
    loss: float | None = None
    validation_loss: float | None = None


class RunContent(msgspec.Struct):
    """What config.json records beside the options. Older versions did not."""

    attention: str | None = None  # the form that was used
    total_steps: Positive | None = None
    data_digest: str | None = None  # see `training.digest`
    validation_digest: str | None = None
    metrics: list[str] | None = None  # at validation, in order
    objective: dict[str, Any] | None = None  # the settings of another than the suffixes


def settings(config: FinetuneConfig) -> dict[str, Any]:
    """The options in config.json. Devices and processes may change when a run is resumed."""
    options = asdict(replace(config, resume=False, attention=None, mesh=None, hosts=None))
    options |= {name: list(x) for name, x in options.items() if isinstance(x, tuple)}  # as in JSON
    for name in ("model", "base"):  # to be found from another directory too
        options[name] = _absolute(options[name])
    return options


def _absolute(reference: str | None) -> str | None:
    if reference is None or reference == "tiny" or not user_path(reference).exists():
        return reference
    return str(user_path(reference).resolve())


def check_run_folder(config: FinetuneConfig, content: RunContent | None = None) -> int | None:
    """Check that a run can start, or resume, in its directory. Nothing is written.

    Args:
        content: The rows of the run; None to check the options only.

    Returns:
        The number of steps that a run to resume was started for, if recorded.

    Raises:
        ValueError: The directory is not empty or, to resume, has no run, one with other settings or
            one with other rows. (The directory and the data may have been moved.)
    """
    folder = Path(config.output)
    for name in config.loggers:
        load_package(name)
    if config.resume:
        return _check_same_run(folder, config, content)
    if folder.exists() and any(path.suffix != TEMPORARY for path in folder.iterdir()):
        raise ValueError(
            f"{folder} is not empty: choose another --output, or continue its run with --resume"
        )
    return None


def _check_same_run(folder: Path, config: FinetuneConfig, content: RunContent | None) -> int | None:
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{folder} has no run to resume: {CONFIG} is missing")
    before, recorded = _read_config(folder / CONFIG)
    ignored = {"output", "steps", "epochs"}
    if recorded.data_digest:  # else an older version, where only the names can be compared
        ignored |= {"data", "validation"}
    now = {name: value for name, value in settings(config).items() if name not in ignored}
    check_settings(folder, settings(before), now, "Resume with the same settings")
    total = recorded.total_steps or before.steps
    if content is None:
        return total
    aims = ({"objective": "suffixes"} | (each.objective or {}) for each in (recorded, content))
    check_settings(folder, next(aims), next(aims), "Resume with the same objective")
    for name, old, new in (
        ("data", recorded.data_digest, content.data_digest),
        ("validation", recorded.validation_digest, content.validation_digest),
    ):
        if old not in (None, new):
            raise ValueError(
                f"{folder} was started with other rows as {name}: resume with the same rows in the "
                "same order; their files may be elsewhere"
            )
    if recorded.metrics not in (None, content.metrics):
        raise ValueError(
            f"{folder} was started with the metrics {recorded.metrics}, got {content.metrics}: "
            "resume with the same"
        )
    if total and content.total_steps and content.total_steps < total:
        raise ValueError(
            f"{folder} was started for {total} steps, and --steps can only grow, got "
            f"{content.total_steps}"
        )
    return total


def load_config(folder: str) -> FinetuneConfig:
    """The configuration of a run.

    Raises:
        ValueError: There is no run, or its config.json is damaged.
    """
    file = user_path(folder) / CONFIG
    if not file.is_file():
        raise ValueError(f"{folder} has no run: {CONFIG} is missing")
    return _read_config(file)[0]


def _read_config(file: Path) -> tuple[FinetuneConfig, RunContent]:
    """Read the config.json of a run. Defaults stand for options that its version did not have.

    Raises:
        ValueError: It is damaged, or has options that this version does not have.
    """
    raw, names = load_json(file), {field.name for field in fields(FinetuneConfig)}
    unknown = sorted(raw.keys() - names - set(RunContent.__struct_fields__))
    if unknown:
        raise ValueError(
            f"{file} is of another version: it has the unknown settings {', '.join(unknown)}; "
            "resume with that version, or start a new run"
        )
    missing = sorted(names - raw.keys())
    if missing:
        warnings.warn(
            f"{file} is of an older version without {', '.join(missing)}: their defaults are "
            "assumed",
            stacklevel=5,
        )
    return check(raw, FinetuneConfig, str(file)), check(raw, RunContent, str(file))


class Run:
    """Writes config.json, log.jsonl, samples.jsonl and loss.png, and to other loggers."""

    def __init__(self, config: FinetuneConfig, content: RunContent):
        self.folder = Path(config.output)
        self.metrics = content.metrics or []
        self.loggers: list[Logger] = []
        if hosts.is_first_process():
            self.folder.mkdir(parents=True, exist_ok=True)
            record = settings(config) | msgspec.structs.asdict(content)
            _write_atomically(self.folder / CONFIG, json.dumps(record, indent=2) + "\n")
            self.loggers = [LOGGERS[name](self.folder, record) for name in config.loggers]
        hosts.barrier("run")

    def rewind(self, step: int) -> None:
        """Drop the log lines of steps after `step`."""
        if hosts.is_first_process():
            for name in (LOG, SAMPLES):
                _truncate_log(self.folder / name, step)

    def close(self) -> None:
        for logger in self.loggers:
            logger.close()

    def log(self, line: LogLine, name: str = LOG) -> None:
        if not hosts.is_first_process():
            return
        # JSON has no NaN; the loss of a validation can be one.
        line = {key: None if _is_nan(value) else value for key, value in line.items()}
        with (self.folder / name).open("a") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
        values = {key: value for key, value in line.items() if isinstance(value, float)}
        if values:
            for logger in self.loggers:
                logger.log(line["step"], values)

    def save_bad_batch(self, line: LogLine, batch: Batch, last: int | None) -> str:
        """Save the batch of a step whose loss or gradient is not finite; return the error."""
        file = self.folder / f"bad_batch_{line['step']}.npz"
        others = {name: array for name, array in vars(batch).items() if name != "inputs"}
        arrays = vars(batch.inputs) | others
        arrays = {name: array for name, array in arrays.items() if array is not None}
        if "features" in arrays:  # .npz files do not support bfloat16
            arrays["features"] = np.asarray(arrays["features"], np.float32)
        if hosts.is_first_process():
            np.savez(file, **arrays)
        return (
            f"loss {line['loss']} and gradient norm {line['gradient_norm']} at step {line['step']} "
            f"must be finite; its batch is saved in {file}, the last checkpoint is of step "
            f"{last}. Lower --learning-rate, or inspect the batch"
        )

    def plot(self) -> None:
        """Write loss.png with the losses and the metrics, if matplotlib is installed."""
        try:
            from matplotlib.figure import Figure
        except ImportError:
            return
        lines = [json.loads(line) for line, _ in _read_log(self.folder / LOG)]
        panels = [("loss (nats per token)", ["loss", "validation_loss"])]
        panels += [(name.removeprefix("validation_"), [name]) for name in self.metrics]
        figure = Figure((8, 1.5 + 3 * len(panels)), layout="constrained")
        each = figure.subplots(len(panels), squeeze=False, sharex=True)[:, 0]
        for axes, (title, names) in zip(each, panels, strict=True):
            for name in names:
                values = [
                    (line["step"], line[name]) for line in lines if line.get(name) is not None
                ]
                marker = "o" if name.startswith("validation_") else None
                if values:
                    label = name.replace("_", " ")
                    axes.plot(*zip(*values, strict=True), marker=marker, label=label)
            axes.set_ylabel(title.replace("_", " "))
            if len(names) > 1:
                axes.legend(frameon=False)
        each[-1].set_xlabel("step")
        figure.savefig(self.folder / "loss.png", dpi=120)


def _read_log(file: Path) -> Iterator[tuple[str, LogEntry]]:
    """The complete lines of a log, and what they say. ValueError if one is damaged."""
    for number, line in enumerate(file.read_bytes().splitlines(keepends=True), 1):
        if line.endswith(b"\n"):
            yield line.decode(), decode(line, LogEntry, f"{file}: line {number}")


def _truncate_log(file: Path, step: int) -> None:
    """Drop the lines of steps after `step`, and an incomplete last line."""
    if file.exists():
        kept = [line for line, entry in _read_log(file) if entry.step <= step]
        _write_atomically(file, "".join(kept))


def _is_nan(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _write_atomically(file: Path, text: str) -> None:
    temporary = file.with_suffix(TEMPORARY)
    temporary.write_text(text)
    os.replace(temporary, file)
