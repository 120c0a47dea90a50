"""Report an evaluation as one self-contained HTML file."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterable
from dataclasses import replace
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from paligemma_jax.evaluation.evaluate import Evaluation
from paligemma_jax.evaluation.published import Published
from paligemma_jax.evaluation.report import (
    PUBLISHED_COLUMNS,
    Z_NOTE,
    format_interval,
    format_value,
    markdown,
    published_cells,
    reference_text,
    sections,
)
from paligemma_jax.metrics.cases import Case
from paligemma_jax.metrics.registry import METRICS
from paligemma_jax.processing.image import load_image
from paligemma_jax.processing.locations import Detection, draw
from paligemma_jax.processing.mask_codec import MaskCodec

SIDE = 360  # pixels along the longer side of an image
BINS = 20
# HTML-escaped locations. The page shows a symbol in their place, because the boxes are drawn.
LOCATIONS = re.compile(r"(?:&lt;loc\d{4}&gt;){4}(?:&lt;seg\d{3}&gt;)*")
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
{style}</style></head><body>
{body}
</body></html>
"""


def save(evaluation: Evaluation, folder: str | Path, count: int = 12, seed: int = 0) -> None:
    """Write report.html and report.md."""
    page, text = html(evaluation, count, seed), markdown(evaluation, count, seed, folder)
    (Path(folder) / "report.html").write_text(page, encoding="utf-8")
    (Path(folder) / "report.md").write_text(text, encoding="utf-8")


def html(evaluation: Evaluation, count: int = 12, seed: int = 0) -> str:
    """Return the report as HTML, images included.

    Args:
        count: Number of cases per section.
        seed: Seed of the random sample.
    """
    title = escape(evaluation.about.get("model", "Evaluation"))
    facts = [(key, value) for key, value in evaluation.about.items() if key != "model"]
    facts.append(("cases", f"{len(evaluation.cases)}"))
    if evaluation.failed:
        facts.append(("failed", f"{evaluation.failed}, counted as empty answers"))
    facts = [f"<div><dt>{escape(key)}</dt><dd>{escape(text)}</dd></div>" for key, text in facts]
    metrics = [_metric(evaluation, name) for name in evaluation.intervals]
    parts = [f"<header><h1>{title}</h1><dl>{''.join(facts)}</dl></header>"]
    parts.append(f"<section class=metrics>{''.join(metrics)}</section>")
    if evaluation.published:
        parts.append(_published(evaluation.published))
    parts += [_kinds(evaluation, name) for name in evaluation.types]
    has_locations = any(METRICS[name].compares != "texts" for name in evaluation.intervals)
    for section in sections(evaluation, count, seed):
        cards = "".join(_card(evaluation, i, has_locations) for i in section.cases)
        heading = f"<h2>{escape(section.title)}</h2>"
        parts.append(f"<section>{heading}<div class=cards>{cards}</div></section>")
    style = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    return PAGE.format(title=title, style=style, body="\n".join(parts))


def _metric(evaluation: Evaluation, name: str) -> str:
    interval, metric = evaluation.intervals[name], METRICS[name]
    parts = [f"<h3>{metric.title}</h3><p class=value>{format_value(name, interval.value)}</p>"]
    parts.append(f"<p class=note>95 %: {format_interval(name, interval)}</p>")
    change = evaluation.differences.get(name)
    if change:
        kind = "same"
        if metric.better and (change.low > 0 or change.high < 0):
            kind = "good" if (change.value > 0) == (metric.better == "higher") else "bad"
        ends = format_interval(name, change, sign=True)
        value = format_value(name, change.value, sign=True)
        note = f"<small>({ends}; p {change.p:.3f})</small>"
        parts.append(f"<p class='change {kind}'>{value} {note}</p>")
    return f"<article>{''.join(parts)}{_histogram(evaluation.scores[name])}</article>"


def _histogram(scores: np.ndarray) -> str:
    low, high = float(scores.min()), float(scores.max())
    if low == high:
        return ""
    counts, _ = np.histogram(scores, BINS, (low, high))
    heights = np.where(counts > 0, np.maximum(counts / counts.max() * 100, 1), 0)
    bars = "".join(
        f"<i style='height:{height:.0f}%' title='{count} cases'></i>"
        for height, count in zip(heights, counts, strict=True)
    )
    ends = f"<span>{low:.3g}</span><span>scores of cases</span><span>{high:.3g}</span>"
    return f"<div class=histogram>{bars}</div><p class='note ends'>{ends}</p>"


def _published(published: Published) -> str:
    """A table of the measured and the published values."""
    rows = ["<tr>" + "".join(f"<th>{name}</th>" for name in PUBLISHED_COLUMNS) + "</tr>"]
    for result in published.results:
        title, *cells = map(escape, published_cells(result))
        named = zip(PUBLISHED_COLUMNS[1:], cells, strict=True)
        cells = "".join(f"<td class=number title={name}>{cell}</td>" for name, cell in named)
        rows.append(f"<tr><th>{title}</th>{cells}</tr>")
    table = f"<table class=published>{''.join(rows)}</table>" if published.results else ""
    note = " ".join([Z_NOTE] * bool(published.results) + [published.note])
    heading = f"<h2>{escape(published.title)}</h2>"
    return f"<section>{heading}{table}<p class=note>{escape(note)}</p></section>"


def _kinds(evaluation: Evaluation, name: str) -> str:
    """A table of one metric by kind of question."""
    kinds, field = evaluation.types[name], evaluation.about.get("by", "type")
    top = max([interval.high for interval in kinds.values() if interval.high > 0], default=1.0)

    def percent(value: float) -> str:
        return f"{np.clip(np.nan_to_num(value) / top, 0, 1) * 100:.1f}%"

    rows = []
    for kind, interval in kinds.items():
        count = sum(str(case.row.get(field)) == kind for case in evaluation.cases)
        ends = f"left:{percent(interval.low)};right:calc(100% - {percent(interval.high)})"
        bar = f"<i style='width:{percent(interval.value)}'></i><b style='{ends}'></b>"
        rows.append(
            f"<tr><th>{escape(kind)}</th><td class=number>{count}</td>"
            f"<td class=number>{format_value(name, interval.value)}</td>"
            f"<td class=bar><div>{bar}</div></td>"
            f"<td class=note>{format_interval(name, interval)}</td></tr>"
        )
    mean = float(np.nanmean([interval.value for interval in kinds.values()]))
    rows.append(
        "<tr><th>mean over kinds</th><td></td>"
        f"<td class=number>{format_value(name, mean)}</td><td class=bar></td><td></td></tr>"
    )
    heading = f"<h2>{METRICS[name].title} by {escape(field)}</h2>"
    return f"<section>{heading}<table>{''.join(rows)}</table></section>"


def _card(evaluation: Evaluation, index: int, has_locations: bool) -> str:
    """Render one case: its images, texts and scores."""
    case = evaluation.cases[index]
    texts = {"prompt": case.row.get("prefix") or "", "answer": case.answer}
    if evaluation.other_cases:
        texts["other run"] = evaluation.other_cases[index].answer
    texts["reference"] = reference_text(case)
    if case.failed:
        texts["error"] = case.row.get("error", "")
    lines = []
    for key, text in texts.items():
        text = escape(text)
        if has_locations:
            text = LOCATIONS.sub(lambda match: f"<abbr title='{match[0]}'>▢</abbr>", text)
        text = text or "<em>(empty)</em>"
        lines.append(f"<div class={key.split()[0]}><dt>{key}</dt><dd>{text}</dd></div>")
    scores = [
        f"<span>{METRICS[name].case_title} <b>{format_value(name, float(each[index]))}</b></span>"
        for name, each in evaluation.scores.items()
    ]
    images = _images(case, has_locations, evaluation.codec)
    footer = f"<p class=scores>{''.join(scores)}</p>"
    return f"<article>{images}<dl>{''.join(lines)}</dl>{footer}</article>"


def _images(case: Case, has_locations: bool, codec: MaskCodec | None) -> str:
    """All images; with locations, the first one with its reference, and again with its answer."""
    try:
        images = [load_image(path) for path in case.images[: 1 if has_locations else None]]
    except ValueError as error:
        return f"<p class=note>{escape(str(error))}</p>"
    figures: Iterable[str] = (_figure(_resized(image), "") for image in images)
    if has_locations:
        image, factor = _resized(images[0]), SIDE / max(images[0].size)
        figures = (
            _figure(draw(image, [_scaled(item, factor, image.size) for item in objects]), name)
            for name, objects in case.drawings(codec).items()
        )
    return f"<div class=images>{''.join(figures)}</div>"


def _resized(image: Image.Image) -> Image.Image:
    factor = SIDE / max(image.size)
    return image.resize([max(round(side * factor), 1) for side in image.size])


def _scaled(item: Detection, factor: float, size: tuple[int, int]) -> Detection:
    """Scale the box by `factor`, and the mask to `size`."""
    left, top, right, bottom = (value * factor for value in item.box)
    mask = item.mask
    if mask is not None:
        mask = np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))
    return replace(item, box=(left, top, right, bottom), mask=mask)


def _figure(image: Image.Image, caption: str) -> str:
    out = io.BytesIO()
    image.convert("RGB").save(out, "JPEG", quality=85)
    source = f"data:image/jpeg;base64,{base64.b64encode(out.getvalue()).decode()}"
    text = f"<figcaption>{caption}</figcaption>" if caption else ""
    return f"<figure><img src='{source}' alt='{caption}'>{text}</figure>"
