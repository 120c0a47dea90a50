"""The report of two training runs as one self-contained HTML file with figures."""

from __future__ import annotations

from html import escape

import numpy as np

from paligemma_jax.parity.html import render_document, render_figure, write_page
from paligemma_jax.parity.plots import FAILURE, FLOOR, make_figure, to_png
from paligemma_jax.parity.report import format_number
from paligemma_jax.parity.training.local import LocalError
from paligemma_jax.parity.training.report import (
    cost,
    passed,
    shown_steps,
    smoothed,
    summary,
    verdict,
    worst_errors,
)
from paligemma_jax.parity.training.run import TrainingReport

GREY = "0.6"
TITLES = (
    "<th>step<th>loss<th>reference<th>relative<th class=detail>local: gradient"
    "<th class=detail>update<th>parameters apart"
)


def write_html(report: TrainingReport, file: str) -> None:
    """Write the report to `file`, replaced in one step."""
    write_page(render_page(report), file)


def render_page(report: TrainingReport) -> str:
    title = f"Training parity of {escape(report.name)}"
    paragraphs = "<br>".join(map(escape, f"{summary(report)}\n{cost(report)}".splitlines()))
    figures = {
        "Loss": (draw_losses(report), _loss_text(report)),
        "Difference of the losses": (
            draw_differences(report),
            "Relative, of the two runs from the first step on. Rounding grows through training; "
            "in float64 it starts a billion times smaller.",
        ),
        "Errors of single steps": (
            draw_local(report),
            "Each step is computed from the state of the reference, so errors do not accumulate. "
            "1 is the limit.",
        ),
    }
    result = "good" if passed(report) else "bad"
    sections = [
        f"<h1>{title}</h1><p>{paragraphs}</p>",
        f'<div class="verdict {result}">{escape(verdict(report))}</div>',
    ]
    sections += [render_figure(heading, text, png) for heading, (png, text) in figures.items()]
    sections.append(f"<h2>Largest errors of single steps</h2>{_worst_table(report)}")
    sections.append(f"<h2>Steps</h2>{_steps_table(report)}")
    return render_document(title, sections)


def draw_losses(report: TrainingReport) -> bytes:
    """Draw the losses of both runs and, in bfloat16, of the other orders of the rows."""
    figure, ((axes,),) = make_figure(11, 4, 1)
    steps = np.arange(1, len(report.losses) + 1)
    if report.seeds is not None:
        curves = smoothed(report.seeds)
        axes.fill_between(steps, curves.min(0), curves.max(0), color="0.85", label="other orders")
        ours, theirs = smoothed(report.losses.T)
    else:
        ours, theirs = report.losses.T
    axes.plot(steps, theirs, color=GREY, lw=3, label="reference")
    axes.plot(steps, ours, color="#0072b2", lw=1, label="this model")
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.legend(frameon=False)
    return to_png(figure)


def draw_differences(report: TrainingReport) -> bytes:
    """Draw how far the losses of the two runs are apart, and the parameters."""
    figure, ((axes,),) = make_figure(11, 4, 1)
    curves = {f"loss, {report.dtype}": (report.losses, "#0072b2")}
    if report.float64 is not None:
        curves["loss, float64"] = report.float64, "#009e73"
    steps = np.arange(1, len(report.losses) + 1)
    for label, (losses, color) in curves.items():
        apart = np.abs(losses[:, 0] - losses[:, 1]) / np.maximum(np.abs(losses[:, 1]), 1e-30)
        floor = FLOOR if losses is report.losses else 1e-16
        axes.plot(steps, np.maximum(apart, floor), lw=0.8, color=color, label=label)
    at = [distance.step for distance in report.distances]
    moved = [max(distance.overall, FLOOR) for distance in report.distances]
    axes.plot(at, moved, "o", color="0.25", label="parameters, over how far they moved")
    axes.set(yscale="log", xlabel="step", ylabel="relative difference")
    axes.legend(frameon=False, fontsize=8)
    return to_png(figure)


def draw_local(report: TrainingReport) -> bytes:
    """Draw the local error of each quantity over its limit, step by step."""
    figure, ((axes,),) = make_figure(11, 4, 1)
    steps = np.arange(1, len(report.local) + 1)
    for i, row in enumerate(report.local[0]):
        errors = [rows[i].error / rows[i].limit for rows in report.local]
        axes.plot(steps, np.maximum(errors, 1e-6), lw=0.8, label=row.quantity)
    axes.axhline(1, ls="--", color=FAILURE, lw=1)
    axes.set(yscale="log", xlabel="step", ylabel="local error over its limit")
    axes.legend(frameon=False, fontsize=8, ncol=7, loc="upper center", bbox_to_anchor=(0.5, 1.1))
    return to_png(figure)


def _loss_text(report: TrainingReport) -> str:
    if report.seeds is None:
        return "The loss of every step."
    return (
        "Smoothed over a twentieth of the run. The band is the reference's loss with "
        f"{len(report.seeds)} orders of the rows."
    )


def _worst_table(report: TrainingReport) -> str:
    def line(step: int, row: LocalError) -> str:
        path = escape(row.parameter).replace("/", "/<wbr>")
        numbers = f"<td>{format_number(row.error)}<td>{format_number(row.limit)}<td>{step}"
        css = ' class="diverges"' if row.diverges else ""
        return f"<tr{css}><td>{row.quantity}{numbers}<td>{path}"

    lines = "".join(line(step, row) for step, row in worst_errors(report))
    titles = "<tr><th>quantity<th>error<th>limit<th>step<th>parameter"
    return f"<table><thead>{titles}</thead>{lines}</table>"


def _steps_table(report: TrainingReport) -> str:
    distances = {distance.step: distance.overall for distance in report.distances}
    lines = []
    for step in shown_steps(report):
        ours, theirs = report.losses[step - 1]
        errors = {row.quantity: row.error for row in report.local[step - 1]}
        cells = [f"{ours:.6f}", f"{theirs:.6f}", format_number(abs(ours - theirs) / abs(theirs))]
        cells += [format_number(errors["gradient"]), format_number(errors["update"])]
        cells.append(format_number(distances.get(step)))
        css = ("", "", "", " class=detail", " class=detail", "")
        row = "".join(f"<td{c}>{cell}" for c, cell in zip(css, cells, strict=True))
        lines.append(f"<tr><td>{step}{row}")
    return f'<table class="stages"><thead><tr>{TITLES}</thead>{"".join(lines)}</table>'
