"""The comparison with an engine, or with a file of logits, as one self-contained HTML file."""

from __future__ import annotations

from html import escape

import numpy as np

from paligemma_jax.parity.engines.against_file import FileReport, file_verdict
from paligemma_jax.parity.engines.releases import CALLS, changes, describe
from paligemma_jax.parity.engines.report import EngineReport, EngineRow, engine_verdict
from paligemma_jax.parity.html import render_document, render_figure, write_page
from paligemma_jax.parity.plots import FAILURE, FLOOR, make_figure, to_png
from paligemma_jax.parity.report import format_number

DEFAULT = "transformers"  # the profile that others are described relative to
# Marker, color and label of each call.
SERIES = {
    "labels": ("o", "#0072b2", CALLS["labels"]),
    "forward": ("s", "#56b4e9", CALLS["forward"]),
    "plain": ("^", "#009e73", CALLS["plain"]),
    "generation": ("D", "0.25", "greedy decoding"),
}
LEGEND = dict(frameon=False, fontsize=8, ncol=6, loc="lower left", bbox_to_anchor=(0, 1))
LABELED = 40  # stages; of more, those that are not layers are labeled, and every fifth layer
ROWS = 8  # of a file that are in the legend


def write_engine_page(report: EngineReport, model: str, file: str) -> None:
    """Write the comparison with an engine to `file`, replaced in one step."""
    write_page(render_engine_page(report, model), file)


def write_file_page(report: FileReport, file: str) -> None:
    """Write the comparison with a file of logits to `file`, replaced in one step."""
    write_page(render_file_page(report), file)


def render_engine_page(report: EngineReport, model: str) -> str:
    title = f"{escape(model)} against {escape(report.engine)}"
    sections = [
        f"<h1>{title}</h1><p>In {report.dtype}, on the same inputs.</p>",
        _verdict(engine_verdict(report), report.first_divergence is None),
        _profile(report.numerics),
        render_figure(
            "Errors by stage",
            "Relative errors since the inputs, in the order of computation. The dashed line is the "
            "limit; red rings mark stages over it.",
            draw_stages(report),
        ),
    ]
    if report.equal_tokens is not None:
        equal = f"{report.equal_tokens:.0%} of the greedy tokens are equal."
        sections.append(f"<h2>Greedy tokens</h2><p>{equal}</p>")
    sections.append(f"<h2>All stages</h2>{_calls(report)}{_stages_table(report)}")
    return render_document(title, sections)


def render_file_page(report: FileReport) -> str:
    title = f"{escape(report.model)} against {escape(report.file)}"
    size = f"{len(report.valid):,} rows with {report.valid.sum():,} tokens, without pads"
    sections = [
        f"<h1>{title}</h1><p>In {report.dtype}, {size}.</p>",
        _verdict(file_verdict(report), not report.diverges),
        _profile(report.numerics),
        render_figure(
            "Errors by token",
            "Relative errors of the logits at each token. The dashed line is the limit; a red ring "
            "marks the first token over it.",
            draw_tokens(report),
        ),
        f"<h2>Logits</h2>{_logits_table(report)}",
        f"<h2>Rows</h2>{_rows_table(report)}",
    ]
    return render_document(title, sections)


def draw_stages(report: EngineReport) -> bytes:
    """Draw the relative error of every stage, one series for each call, with the limits."""
    named = [(*_split(row.stage), row) for row in report.rows]
    stages = list(dict.fromkeys(stage for _, stage, _ in named))
    figure, ((axes,),) = make_figure(11, 4.6, 1)
    several = len({call for call, _, _ in named} - {"generation"}) > 1
    for series, (marker, color, label) in SERIES.items():
        rows = [(stages.index(stage), row) for call, stage, row in named if call == series]
        if rows:
            values = [max(row.error.relative, FLOOR) for _, row in rows]
            label = label if several or series == "generation" else "teacher-forced"
            line = dict(ms=5, lw=0.8, color=color, label=label)
            axes.plot([place for place, _ in rows], values, marker, ls="-", **line)
    limits = {stage: row.limit for _, stage, row in named}
    limit = dict(where="mid", ls="--", color="0.6", lw=1, label="limit")
    axes.step(range(len(stages)), [limits[stage] for stage in stages], **limit)
    over = [(stages.index(stage), row) for _, stage, row in named if row.diverges]
    if over:
        values = [max(row.error.relative, FLOOR) for _, row in over]
        ring = dict(ms=12, mfc="none", mec=FAILURE, label="over the limit")
        axes.plot([place for place, _ in over], values, "o", **ring)
    axes.set(yscale="log", ylabel="relative error")
    shown = [place for place, stage in enumerate(stages) if _is_labeled(stage, len(stages))]
    names = [stages[place].replace("/layers/", " ").replace("/", " ") for place in shown]
    axes.set_xticks(shown, names, rotation=90, fontsize=7)
    axes.legend(**LEGEND)
    return to_png(figure)


def draw_tokens(report: FileReport) -> bytes:
    """Draw the relative error of the logits at each token, one line for each row."""
    figure, ((axes,),) = make_figure(11, 4, 1)
    for row, errors in enumerate(report.by_token):
        label = f"row {row}" if row < ROWS else None
        axes.plot(np.maximum(errors, FLOOR), ".-", ms=4, lw=0.8, label=label)
    axes.axhline(report.limit, ls="--", color="0.6", lw=1, label="limit")
    if report.first_divergence is not None:
        row, token = report.first_divergence
        ring = dict(ms=12, mfc="none", mec=FAILURE, label="first over the limit")
        axes.plot([token], [report.by_token[row, token]], "o", **ring)
    axes.set(yscale="log", xlabel="token", ylabel="relative error")
    axes.legend(**LEGEND)
    return to_png(figure)


def _split(stage: str) -> tuple[str, str]:
    """The call of a row's stage, and the stage."""
    call, _, rest = stage.partition("/")
    return (call, rest) if call in CALLS else ("generation", stage)


def _is_labeled(stage: str, count: int) -> bool:
    if count <= LABELED or "/layers/" not in stage:
        return True
    return int(stage.rsplit("/", 1)[1]) % 5 == 0


def _verdict(sentence: str, good: bool) -> str:
    return f'<div class="verdict {"good" if good else "bad"}">{escape(sentence)}</div>'


def _profile(numerics: str) -> str:
    """What a profile computes differently from the default."""
    heading = f"<h2>The profile <code>{numerics}</code></h2>"
    if numerics == DEFAULT:
        return f"{heading}<p>This is the default profile, {describe([DEFAULT])}.</p>"
    different = changes(DEFAULT, numerics)
    if not different:
        return f"{heading}<p>For these calls it is the default, {describe([DEFAULT])}.</p>"
    items = "".join(f"<li>{escape(change)}</li>" for change in different)
    text = f"Where it differs from the default, {describe([DEFAULT])}:"
    return f"{heading}<p>{text}</p><ul>{items}</ul>"


def _calls(report: EngineReport) -> str:
    """The meaning of the first part of stage names, if there are several."""
    present = {_split(row.stage)[0] for row in report.rows}
    items = [f"<code>{call}</code>: {text}" for call, text in CALLS.items() if call in present]
    return f"<p>{'; '.join(items)}.</p>" if len(items) > 1 else ""


def _stages_table(report: EngineReport) -> str:
    def line(row: EngineRow) -> str:
        stage = escape(row.stage).replace("/", "/<wbr>")
        numbers = (row.error.max, row.error.mean, row.error.relative, row.limit)
        details = ("", " class=detail", "", "")
        cells = "".join(
            f"<td{css}>{format_number(number)}"
            for css, number in zip(details, numbers, strict=True)
        )
        css = ' class="diverges"' if row.diverges else ""
        return f"<tr{css}><td>{stage}{cells}"

    titles = "<tr><th>stage<th>max<th class=detail>mean<th>relative<th>limit"
    return f'<table class="stages"><thead>{titles}</thead>{"".join(map(line, report.rows))}</table>'


def _logits_table(report: FileReport) -> str:
    css = ' class="diverges"' if report.diverges else ""
    lines = (
        f"<tr{css}><td>relative error<td>{format_number(report.error.relative)}",
        f"<tr><td>limit<td>{format_number(report.limit)}",
        f"<tr><td>largest difference<td>{format_number(report.error.max)}",
        f"<tr><td>same largest logit<td>{report.equal_tokens:.2%} of tokens",
    )
    return f"<table>{''.join(lines)}</table>"


def _rows_table(report: FileReport) -> str:
    lines = []
    for row, errors in enumerate(report.by_token):
        errors = errors[report.valid[row]]
        over = ~(errors <= report.limit)
        largest = format_number(errors.max()) if len(errors) else ""
        css = ' class="diverges"' if report.diverges and over.any() else ""
        lines.append(f"<tr{css}><td>{row}<td>{len(errors)}<td>{largest}<td>{over.sum()}")
    titles = "<tr><th>row<th>tokens<th>largest error<th>over limit"
    return f'<table class="stages"><thead>{titles}</thead>{"".join(lines)}</table>'
