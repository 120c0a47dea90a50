"""A parity report as one self-contained HTML file."""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Callable, Iterable
from html import escape

from convert.files import user_path
from paligemma_jax.parity import float64_report, plots
from paligemma_jax.parity.compare import StageError
from paligemma_jax.parity.report import (
    adaptations,
    cost,
    details,
    float64_lines,
    format_number,
    note,
    ratio_numbers,
    reference,
    summary,
    verdict,
)
from paligemma_jax.parity.run import Report

# On a narrow screen, figures scroll by themselves, columns of class `detail` are hidden, and stage
# names break after a slash.
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem;
  color: #222; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
.verdict { padding: .7rem 1rem; border-radius: .4rem; margin: 1rem 0; white-space: pre-wrap;
  font-weight: 600; }
.good { background: #e2f3e5; color: #14532d; } .bad { background: #fde4e1; color: #7f1d1d; }
img { width: 100%; min-width: 40rem; } .figure { overflow-x: auto; } p, li { color: #444; }
table { border-collapse: collapse; font-size: 13px; width: 100%; }
th, td { text-align: left; padding: .15rem .6rem; border-bottom: 1px solid #eee; }
thead th { position: sticky; top: 0; background: #fff; }
.stages :is(th, td) { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.stages :is(th, td):first-child { text-align: left; white-space: normal; overflow-wrap: normal; }
.stages td:first-child { font-family: ui-monospace, monospace; }
tr.part td:first-child { padding-left: 1.6rem; color: #666; }
tr.diverges { background: #fde4e1; } tr.over-limit { background: #fff4d6; }
@media (max-width: 600px) {
  table { font-size: 12px; } th, td { padding: .15rem .25rem; } .detail { display: none; }
  tr.part td:first-child { padding-left: .8rem; }
}
"""
# Titles, and whether the column is a detail.
FLOAT32_COLUMNS = (
    *(("max", True), ("mean", True), ("relative", False), ("1 - cosine", True), ("limit", False)),
    *(("local max", True), ("local", False), ("limit", False)),
)
RATIO_COLUMNS = (
    *(("relative", True), ("transformers", True), ("ratio", False), ("limit", False)),
    *(("local", True), ("transformers", True), ("local ratio", False), ("limit", False)),
)
FIGURES: dict[str, tuple[Callable[[Report], bytes], str]] = {
    "Errors by stage": (
        plots.draw_errors,
        "Red rings mark stages over their limit. An error of exactly 0 is drawn at the bottom.",
    ),
    "Logits": (plots.draw_logits, "A sample of the first row's logits at all valid positions."),
    "Attention masks": (
        plots.draw_masks,
        "Attention weights of the first row, averaged over heads, on a logarithmic scale. Lines "
        "separate pads, image, prompt and suffix. Attention is bidirectional over image and prompt "
        "and causal over the suffix; the window of a local layer narrows only the causal part.",
    ),
    "Errors by token": (
        plots.draw_tokens,
        "Accumulated errors of the decoder layers at each token of the first row.",
    ),
}


def write_html(report: Report, file: str) -> None:
    """Write the report to `file`, replaced in one step."""
    write_page(render_page(report), file)


def write_page(page: str, file: str) -> None:
    """Write a page to a file, replaced in one step."""
    path = user_path(file)
    part = path.with_name(path.name + ".part")
    part.write_text(page, encoding="utf-8")
    os.replace(part, path)


def render_page(report: Report) -> str:
    title = f"Parity of {escape(report.config.model)}"
    lines = (summary(report), reference(report), cost(report))
    sections = [
        f"<h1>{title}</h1>",
        f"<p>{'.<br>'.join(map(escape, lines))}.</p>",
        f'<div class="verdict {"bad" if report.first_divergence else "good"}">'
        f"{escape(verdict(report))}</div>",
        *(f"<p>{escape(line)}.</p>" for line in float64_lines(report)),
    ]
    if details(report):
        items = "".join(f"<li>{escape(line)}</li>" for line in details(report))
        sections.append(f"<h2>What differs</h2><ul>{items}</ul>")
    adapted = adaptations(report).items()
    if adapted:
        items = "".join(f"<li><code>{name}</code>: {escape(text)}</li>" for name, text in adapted)
        sections.append(f"<h2>How transformers was adapted to this profile</h2><ul>{items}</ul>")
    for heading, (draw, text) in FIGURES.items():
        if not plots.can_draw(draw, report):
            continue
        sections.append(render_figure(heading, text, draw(report)))
    if report.tokens and report.tokens.texts:
        sections.append(f"<h2>Greedy answers</h2>{_answers_table(report)}")
    sections.append(f"<h2>All stages</h2><p>{escape(note(report))}</p>{_stages_table(report)}")
    return render_document(title, sections)


def render_figure(heading: str, text: str, png: bytes) -> str:
    """A section with a figure, embedded in the page."""
    image = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    figure = f'<div class="figure"><img alt="{heading}" src="{image}"></div>'
    return f"<h2>{heading}</h2><p>{text}</p>{figure}"


def render_document(title: str, sections: Iterable[str]) -> str:
    """A page in the style of all reports. The title and the sections are HTML."""
    meta = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    head = f"{meta}<title>{title}</title><style>{STYLE}</style>"
    return f"<!doctype html><html lang=en>{head}{''.join(sections)}</html>\n"


def _answers_table(report: Report) -> str:
    tokens = report.tokens
    assert tokens is not None and tokens.texts is not None
    lines = "".join(
        f"<tr><td>{escape(ours)}<td>{escape(theirs)}<td>{'' if at is None else at}"
        for ours, theirs, at in zip(*tokens.texts, tokens.first_differences, strict=True)
    )
    titles = "<tr><th>this model<th>transformers<th>first differing token"
    return f"<table><thead>{titles}</thead>{lines}</table>"


def _stages_table(report: Report) -> str:
    columns = RATIO_COLUMNS if report.by_ratio else FLOAT32_COLUMNS
    if report.config.float64:
        columns += tuple((title, False) for title in float64_report.COLUMNS)
    classes = [' class="detail"' if detail else "" for _, detail in columns]
    titles = "".join(f"<th{c}>{title}" for c, (title, _) in zip(classes, columns, strict=True))
    lines = []
    for row in report.rows:
        numbers = _numbers(row, report.by_ratio)
        numbers += float64_report.numbers(row) if report.config.float64 else []
        cells = "".join(
            f"<td{c}>{number}"
            for c, number in zip(classes, map(format_number, numbers), strict=True)
        )
        stage = escape(row.stage).replace("/", "/<wbr>")
        lines.append(f'<tr class="{_row_class(row)}"><td>{stage}{cells}')
    head = f"<thead><tr><th>stage{titles}</thead>"
    return f'<table class="stages">{head}{"".join(lines)}</table>'


def _numbers(row: StageError, by_ratio: bool) -> list[float | None]:
    error, local = row.accumulated, row.local
    if by_ratio:
        return [*ratio_numbers(row, 0), *ratio_numbers(row, 1)]
    numbers: list[float | None] = [
        error.max,
        error.mean,
        error.relative,
        error.cosine,
        row.limits[0],
    ]
    return numbers + ([local.max, local.relative, row.limits[1]] if local else [None] * 3)


def _row_class(row: StageError) -> str:
    if row.diverges:
        return "diverges"
    if row.over_limit:
        return "over-limit"
    return "part" if re.search(r"/layers/.*/(weights|output)$", row.stage) else ""
