"""A `Report` as one HTML file that needs nothing beside it."""

from __future__ import annotations

import base64
import os
from html import escape
from pathlib import Path

from paligemma_jax.parity import plots
from paligemma_jax.parity.compare import StageError
from paligemma_jax.parity.report import NOTE, adapted, cells, head, verdict
from paligemma_jax.parity.run import Report

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
.verdict { padding: .7rem 1rem; border-radius: .4rem; margin: 1rem 0; white-space: pre-wrap; font-weight: 600; }
.good { background: #e2f3e5; color: #14532d; } .bad { background: #fde4e1; color: #7f1d1d; }
img { max-width: 100%; } p, li { color: #444; } pre { white-space: pre-wrap; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: 13px; width: 100%; }
th, td { text-align: right; padding: .15rem .6rem; border-bottom: 1px solid #eee; font-variant-numeric: tabular-nums; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; font-family: ui-monospace, monospace; } thead th { position: sticky; top: 0; background: #fff; }
tr.part td:first-child { padding-left: 1.6rem; color: #666; } tr.diverges { background: #fde4e1; } tr.beyond { background: #fff4d6; }
"""
FIGURES = (
    ("Errors by stage", plots.errors, "Red rings are beyond the limit. An error of exactly 0 is drawn at the bottom."),
    ("Logits", plots.logits, "Of the first row, all valid positions; a sample."),
    (
        "Who sees whom",
        plots.masks,
        "Attention weights of the first row, mean over heads, logarithmic; red lines part pads, image, prompt and suffix. "
        "Image and prompt see each other both ways, the suffix is causal, and the window of a local layer narrows only what is causal.",
    ),
    ("Errors by token", plots.tokens, "What has come together in the decoder of the first row."),
)


def write_html(report: Report, file: str) -> None:
    """Beside its place first, so that it is there whole or not at all."""
    path = Path(file).expanduser()
    part = path.with_name(path.name + ".part")
    part.write_text(page(report), encoding="utf-8")
    os.replace(part, path)


def page(report: Report) -> str:
    good = "bad" if report.first else "good"
    first, *about = head(report).split("\n")
    sections = [f"<h1>Parity of {escape(report.plan.model)}</h1>", f"<p>{escape(first)}.<br>{escape(about[0])}.</p>"]
    sections.append(f'<div class="verdict {good}">{escape(verdict(report))}</div>')
    if changed := adapted(report):
        items = "".join(f"<li><code>{name}</code>: {escape(text)}</li>" for name, text in changed.items())
        sections.append(f"<h2>How transformers was made to compute this profile</h2><ul>{items}</ul>")
    for title, draw, text in FIGURES:
        if draw is plots.masks and not any(name.endswith("weights") for name in report.pictures):
            continue
        image = base64.b64encode(draw(report)).decode()
        sections.append(f'<h2>{title}</h2><p>{text}</p><img alt="{title}" src="data:image/png;base64,{image}">')
    if report.tokens and report.tokens.texts:
        lines = "".join(
            f"<tr><td>{escape(ours)}</td><td>{escape(theirs)}</td><td>{'' if at is None else at}</td></tr>"
            for ours, theirs, at in zip(*report.tokens.texts, report.tokens.first)
        )
        sections.append(f"<h2>Greedy answers</h2><table><tr><th>this model</th><th>transformers</th><th>differ from token</th></tr>{lines}</table>")
    sections.append(f'<h2>Every stage</h2><p>{escape(NOTE[report.narrow])}</p><div class="wide">{_table(report)}</div>')
    meta = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    return (
        f"<!doctype html><html lang=en>{meta}<title>parity of {escape(report.plan.model)}</title><style>{STYLE}</style>{''.join(sections)}</html>\n"
    )


def _table(report: Report) -> str:
    names = ["stage", "max", "mean", "relative", "1 - cosine", "limit", "local max", "local relative", "limit"]
    if report.narrow:
        names = ["stage", "relative", "theirs", "times", "limit", "local relative", "theirs", "times", "limit"]
    lines = "".join(_line(row, report.narrow) for row in report.rows)
    return f"<table><thead><tr>{''.join(f'<th>{name}</th>' for name in names)}</tr></thead>{lines}</table>"


def _line(row: StageError, narrow: bool) -> str:
    off, local, (own, own_local) = row.accumulated, row.local, row.own
    if narrow:
        values = [off.relative, own and own.relative, own and row.judged[0], own and row.limits[0]]
        values += [local and local.relative, own_local and own_local.relative, own_local and row.judged[1], own_local and row.limits[1]]
    else:
        values = [off.max, off.mean, off.relative, off.cosine, row.limits[0]]
        values += [local and local.max, local and local.relative, local and row.limits[1]]
    kind = (
        "diverges"
        if row.diverges
        else "beyond"
        if row.beyond
        else "part"
        if "/layers/" in row.stage and row.stage.endswith(("/weights", "/output"))
        else ""
    )
    return f'<tr class="{kind}"><td>{escape(row.stage)}</td>{"".join(f"<td>{text}</td>" for text in cells(*values))}</tr>'
