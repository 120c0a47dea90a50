"""The report of two training runs as text and as data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from importlib.metadata import version

import numpy as np

from paligemma_jax.parity.report import format_number
from paligemma_jax.parity.training.local import FLOAT32_EPS, LOGIT, LocalError
from paligemma_jax.parity.training.run import TrainingReport

LOSS_LIMIT = 1e-3  # relative, of complete runs
SHOWN = {1, 2, 3, 5, 10, 20, 50}  # steps in the table, and every hundredth and the last
GROUPS = ("scale", "bias", "kernel", "table", "lora_a", "lora_b", "lora_magnitude")


def first_divergence(report: TrainingReport) -> tuple[int, LocalError] | None:
    """The first step, counted from 1, that is computed differently from the same state, and its
    first quantity."""
    return next(
        ((step, row) for step, rows in enumerate(report.local, 1) for row in rows if row.diverges),
        None,
    )


def parts_at(losses: np.ndarray) -> int | None:
    """The first step, counted from 1, whose losses differ by more than the limit."""
    ours, theirs = losses.T
    rounding = LOGIT * FLOAT32_EPS
    apart = ~(np.abs(ours - theirs) <= LOSS_LIMIT * np.abs(theirs) + rounding)
    return int(apart.argmax()) + 1 if apart.any() else None


def smoothed(losses: np.ndarray) -> np.ndarray:
    """The mean of a twentieth of the run around each step: float64[..., steps]."""
    window = max(1, losses.shape[-1] // 20)
    sums = np.cumsum(np.pad(losses, [(0, 0)] * (losses.ndim - 1) + [(window, 0)], "edge"), axis=-1)
    return (sums[..., window:] - sums[..., :-window]) / window


def outside_spread(report: TrainingReport) -> int:
    """In bfloat16, at how many steps the smoothed losses of both runs differ by more than those of
    the reference with other orders of the rows (largest minus smallest)."""
    assert report.seeds is not None
    spread = np.ptp(smoothed(report.seeds), axis=0)
    ours, theirs = smoothed(report.losses.T)
    return int((np.abs(ours - theirs) > spread).sum())


def passed(report: TrainingReport) -> bool:
    """Whether both programs train alike, up to rounding."""
    if first_divergence(report):
        return False
    if report.seeds is not None:
        return not outside_spread(report)
    if parts_at(report.losses) is None:
        return True
    return report.float64 is not None and parts_at(report.float64) is None


def verdict(report: TrainingReport) -> str:
    """The result in a few sentences."""
    first = first_divergence(report)
    if first:
        return _describe_divergence(*first)
    steps = report.case.steps
    text = f"each of {steps} steps is within tolerance of the reference's"
    if report.seeds is not None:
        count = outside_spread(report)
        where = f"leaves at {count} of {steps} steps" if count else "never leaves"
        return f"{text}; the loss {where} the spread of {len(report.seeds)} orders of the rows"
    at = parts_at(report.losses)
    if at is None:
        return f"{text}, and so is the loss of the complete run"
    text += (
        f"; the losses of the complete runs differ by more than {LOSS_LIMIT:g} from step {at} on"
    )
    if report.float64 is None:
        return f"{text}: --float64 tells whether that is rounding"
    exact = parts_at(report.float64)
    if exact is None:
        return f"{text}, which is rounding: in float64 they agree to the end"
    return f"{text}, and in float64 from step {exact} on"


def format_report(report: TrainingReport) -> str:
    """The complete report, at most 100 columns wide."""
    lines = [summary(report), cost(report), "", _row(TITLES)]
    lines += [_line(report, step) for step in shown_steps(report)]
    lines += ["", *_worst_lines(report)]
    if report.float64 is not None:
        lines += ["", f"in float64, the losses differ by at most {_largest(report.float64):.1e}"]
    return "\n".join([*lines, "", verdict(report)])


def summary(report: TrainingReport) -> str:
    """Describe the runs."""
    case, config = report.case, report.case.config
    peft = f" and peft {version('peft')}" if config.lora else ""
    return (
        f"{report.name}, {report.dtype}, against transformers {version('transformers')}{peft} and "
        f"AdamW of torch {version('torch')}:\n{case.steps} steps of {config.batch_size} of "
        f"{len(case.row_weights)} rows, --train {config.train}, learning rate "
        f"{config.learning_rate:g} ({config.schedule}), weight decay {config.weight_decay:g}, "
        f"clip {config.clip:g}\n"
        "without dropout and augmentation; local errors: one step from the reference's state"
    )


def cost(report: TrainingReport) -> str:
    """Describe time and memory."""
    return f"{report.seconds:.0f} s, peak memory {report.peak_bytes / 2**30:.2f} GiB"


def as_dict(report: TrainingReport) -> dict:
    """Plain data, for --json."""
    first = first_divergence(report)
    return {
        "model": report.name,
        "dtype": report.dtype,
        "config": asdict(report.case.config),
        "losses": report.losses.tolist(),
        "float64_losses": None if report.float64 is None else report.float64.tolist(),
        "reference_losses_by_order": None if report.seeds is None else report.seeds.tolist(),
        "local": [[asdict(row) for row in rows] for rows in report.local],
        "distances": [asdict(distance) for distance in report.distances],
        "first_divergence": first and {"step": first[0], **asdict(first[1])},
        "passed": passed(report),
        "verdict": verdict(report),
        "seconds": report.seconds,
        "peak_bytes": report.peak_bytes,
    }


WIDTHS = (6, 10, 10, 9, 9, 9, 11)
TITLES = ("step", "loss", "reference", "relative", "gradient", "update", "parameters")


def shown_steps(report: TrainingReport) -> list[int]:
    steps = report.case.steps
    return [s for s in range(1, steps + 1) if s in SHOWN or s % 100 == 0 or s == steps]


def _line(report: TrainingReport, step: int) -> str:
    ours, theirs = report.losses[step - 1]
    errors = {row.quantity: row.error for row in report.local[step - 1]}
    distances = {distance.step: distance.overall for distance in report.distances}
    apart = format_number(distances[step]) if step in distances else ""
    relative = abs(ours - theirs) / abs(theirs) if theirs else 0.0
    cells = [str(step), f"{ours:.6f}", f"{theirs:.6f}", f"{relative:.1e}"]
    cells += [format_number(errors["gradient"]), format_number(errors["update"]), apart]
    return _row(cells)


def _row(cells: Iterable[str]) -> str:
    return " ".join(cell.rjust(width) for cell, width in zip(cells, WIDTHS, strict=True)).rstrip()


def worst_errors(report: TrainingReport) -> list[tuple[int, LocalError]]:
    """For each quantity, the step, counted from 1, with the largest local error in units of its
    limit."""
    quantities = zip(*report.local, strict=True)  # all steps of each

    def over_limit(item: tuple[int, LocalError]) -> float:
        return item[1].error / item[1].limit

    return [max(enumerate(rows, 1), key=over_limit) for rows in quantities]


def _worst_lines(report: TrainingReport) -> list[str]:
    lines = [f"{'largest':16} {'error':>8} {'limit':>8} {'step':>6}"]
    for step, row in worst_errors(report):
        numbers = f"{row.error:8.1e} {row.limit:8.1e} {step:6}"
        lines.append(f"{row.quantity:16} {numbers}  {row.parameter}".rstrip())
    return lines


def _describe_divergence(step: int, row: LocalError) -> str:
    where = f" of {row.parameter}" if row.parameter else ""
    text = f"first divergence: step {step}, {row.quantity}{where}: "
    text += f"{row.error:.1e}, limit {row.limit:.1e}"
    if not row.parameter:
        return text
    kinds = [kind for kind in GROUPS if any(path.endswith(f"/{kind}") for path in row.diverging)]
    return f"{text}\n{len(row.diverging)} parameters diverge in this step: {', '.join(kinds)}"


def _largest(losses: np.ndarray) -> float:
    ours, theirs = losses.T
    return float(np.max(np.abs(ours - theirs) / np.maximum(np.abs(theirs), 1e-300)))
