"""An evaluation to look at: one HTML file that needs no other, and Markdown."""

from __future__ import annotations

import base64
import io
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from paligemma_jax.evaluation.cases import METRICS, POINTING, Case, enlarged
from paligemma_jax.evaluation.evaluate import Evaluation
from paligemma_jax.evaluation.style import PAGE
from paligemma_jax.metrics.bootstrap import Interval
from paligemma_jax.processing.image import load_image
from paligemma_jax.processing.locations import draw
from paligemma_jax.processing.mask_codec import MaskCodec

SIDE = 360  # pixels along the longer side of a picture
BINS = 20
PLACE = re.compile(r"(?:&lt;loc\d{4}&gt;){4}(?:&lt;seg\d{3}&gt;)*")  # escaped; not worth reading where it is drawn


@dataclass(frozen=True)
class Section:
    """Some cases, by number, and why they are shown."""

    title: str
    cases: Sequence[int]


def sections(evaluation: Evaluation, count: int = 12, seed: int = 0) -> list[Section]:
    """The worst under the first metric that has better and worse, what the other run did better and worse, and a random sample."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(evaluation.cases))  # among cases alike, any of them
    found = []
    judged = [name for name in evaluation.figures if METRICS[name].better]
    if judged:
        name = judged[0]
        good = evaluation.each[name] * (-1 if METRICS[name].better == "lower" else 1)
        worst = order[np.argsort(good[order], kind="stable")][:count]
        found.append(Section(f"Worst by {case_title(name)}", [int(i) for i in worst if good[i] < good.max()]))
        if evaluation.changes:
            change = evaluation.changes[name] * (-1 if METRICS[name].better == "lower" else 1)
            ranked = order[np.argsort(change[order], kind="stable")]
            found.append(Section("Better in the other run", [int(i) for i in ranked[:count] if change[i] < 0]))
            found.append(Section("Better in this run", [int(i) for i in ranked[::-1][:count] if change[i] > 0]))
    found.append(Section("A random sample", [int(i) for i in rng.permutation(len(evaluation.cases))[:count]]))
    return [section for section in found if section.cases]


def title(name: str) -> str:
    words = {"vqa": "VQA accuracy", "anls": "ANLS", "cider": "CIDEr-D", "bleu": "BLEU", "average_precision": "AP", "ap50": "AP50", "ap75": "AP75",
             "mask_iou": "mask mIoU", "box_iou": "box mIoU", "box_accuracy": "box accuracy at 0.5", "characters": "#char", "sentences": "#sent",
             "tallyqa": "TallyQA accuracy", "rsvqa": "RSVQA accuracy", "pope_f1": "POPE F1"}  # fmt: skip
    return words.get(name, name.replace("_", " ").replace("pope", "POPE"))


def case_title(name: str) -> str:
    """Of what one case has under a metric."""
    ranges = {"average_precision": "F1 of boxes at 0.5 to 0.95", "ap50": "at 0.5", "ap75": "at 0.75"}
    return ranges.get(name, title(name))


def figure(name: str, value: float, sign: bool = False) -> str:
    """As papers print it: those with percent times 100. A dash where there is nothing to measure."""
    if np.isnan(value):
        return "–"
    return f"{value * (100 if METRICS[name].percent else 1):{'+' if sign else ''}.1f}"


def spread(name: str, found: Interval, sign: bool = False) -> str:
    return "" if np.isnan(found.low) else f"{figure(name, found.low, sign)} to {figure(name, found.high, sign)}"


# ---- HTML


def html(evaluation: Evaluation, count: int = 12, seed: int = 0) -> str:
    """The whole page, pictures included. count: cases of a section."""
    names = list(evaluation.figures)
    facts = [*evaluation.about.items(), ("cases", f"{len(evaluation.cases)}")]
    facts += [("failed", f"{evaluation.failed}, which count as answered with nothing")] if evaluation.failed else []
    parts = [f"<header><h1>{escape(evaluation.about.get('model', 'Evaluation'))}</h1><dl>"]
    parts += [f"<div><dt>{escape(key)}</dt><dd>{escape(value)}</dd></div>" for key, value in facts if key != "model"]
    parts += ["</dl></header><section class=figures>", *(_figure(evaluation, name) for name in names), "</section>"]
    parts += [_kinds(evaluation, name) for name in names if name in evaluation.types]
    drawn = bool(POINTING & set(names))
    for section in sections(evaluation, count, seed):
        cards = "".join(_card(evaluation, i, drawn) for i in section.cases)
        parts.append(f"<section><h2>{escape(section.title)}</h2><div class=cards>{cards}</div></section>")
    return PAGE.format(title=escape(evaluation.about.get("model", "Evaluation")), body="\n".join(parts))


def _figure(evaluation: Evaluation, name: str) -> str:
    found = evaluation.figures[name]
    parts = [f"<article><h3>{title(name)}</h3><p class=value>{figure(name, found.value)}</p><p class=note>95 %: {spread(name, found)}</p>"]
    if change := evaluation.differences.get(name):
        known = change.low > 0 or change.high < 0
        up = (change.value > 0) == (METRICS[name].better != "lower")
        kind = ("good" if up else "bad") if known and METRICS[name].better else "same"
        parts.append(
            f"<p class='change {kind}'>{figure(name, change.value, True)} <small>({spread(name, change, True)}; p {change.p:.3f})</small></p>"
        )
    return "".join([*parts, _histogram(evaluation.each[name]), "</article>"])


def _histogram(each: np.ndarray) -> str:
    """How the cases spread, from the least to the most."""
    low, high = float(each.min()), float(each.max())
    if low == high:
        return ""
    counts, _ = np.histogram(each, BINS, (low, high))
    bars = "".join(f"<i style='height:{max(count / counts.max() * 100, 1 if count else 0):.0f}%' title='{count} cases'></i>" for count in counts)
    return f"<div class=histogram>{bars}</div><p class='note ends'><span>{low:.3g}</span><span>each case</span><span>{high:.3g}</span></p>"


def _kinds(evaluation: Evaluation, name: str) -> str:
    kinds, key = evaluation.types[name], evaluation.about.get("by", "type")
    top = max([found.high for found in kinds.values() if found.high > 0], default=1.0)
    part = lambda value: f"{np.clip(np.nan_to_num(value) / top, 0, 1) * 100:.1f}%"
    counts = {kind: sum(str(case.row.get(key)) == kind for case in evaluation.cases) for kind in kinds}
    rows = "".join(
        f"<tr><th>{escape(kind)}</th><td class=number>{counts[kind]}</td><td class=number>{figure(name, found.value)}</td>"
        f"<td class=bar><div><i style='width:{part(found.value)}'></i>"
        f"<b style='left:{part(found.low)};right:calc(100% - {part(found.high)})'></b></div></td>"
        f"<td class=note>{spread(name, found)}</td></tr>"
        for kind, found in kinds.items()
    )
    mean = figure(name, float(np.nanmean([found.value for found in kinds.values()])))
    last = f"<tr><th>mean of the kinds</th><td></td><td class=number>{mean}</td><td></td><td></td></tr>"
    return f"<section><h2>{title(name)} by {escape(key)}</h2><table>{rows}{last}</table></section>"


def _card(evaluation: Evaluation, index: int, drawn: bool) -> str:
    case = evaluation.cases[index]
    scores = "".join(f"<span>{case_title(name)} <b>{figure(name, float(each[index]))}</b></span>" for name, each in evaluation.each.items())
    lines = [("asked", case.row.get("prefix", "")), ("answer", case.answer)]
    lines += [("other run", evaluation.others[index].answer)] if evaluation.others else []
    lines += [("right", "  ·  ".join(dict.fromkeys(case.right)) if "suffix" in case.row or "answers" in case.row else "")]
    lines += [("error", case.row["error"])] if "error" in case.row else []
    short = lambda text: PLACE.sub(lambda place: f"<abbr title='{place[0]}'>▢</abbr>", escape(text)) if drawn else escape(text)
    told = "".join(f"<div class={key.split()[0]}><dt>{key}</dt><dd>{short(text) or '<em>nothing</em>'}</dd></div>" for key, text in lines)
    return f"<article>{_pictures(case, drawn, evaluation.codec)}<dl>{told}</dl><p class=scores>{scores}</p></article>"


def _pictures(case: Case, drawn: bool, codec: MaskCodec | None) -> str:
    """The first image; with what is right and what was answered drawn onto it, if `drawn`."""
    try:
        images = [load_image(path) for path in (case.images[:1] if drawn else case.images)]
    except ValueError as error:
        return f"<p class=note>{escape(str(error))}</p>"
    factors = [SIDE / max(image.size) for image in images]
    large = [image.resize([max(round(side * factor), 1) for side in image.size]) for image, factor in zip(images, factors)]
    if not drawn:
        return f"<div class=pictures>{''.join(_picture(image, '') for image in large)}</div>"
    picture = lambda things: draw(large[0], [enlarged(thing, factors[0], large[0].size) for thing in things])
    return f"<div class=pictures>{''.join(_picture(picture(things), name) for name, things in case.drawings(codec).items())}</div>"


def _picture(image: Image.Image, caption: str) -> str:
    out = io.BytesIO()
    image.convert("RGB").save(out, "JPEG", quality=85)
    data = base64.b64encode(out.getvalue()).decode()
    return f"<figure><img src='data:image/jpeg;base64,{data}' alt='{caption}'>{f'<figcaption>{caption}</figcaption>' if caption else ''}</figure>"


# ---- Markdown


def markdown(evaluation: Evaluation, count: int = 12, seed: int = 0, folder: str | Path = ".") -> str:
    """The same without pictures, which it links to from `folder`."""
    plain = lambda text: str(text).replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")
    lines = [f"# {evaluation.about.get('model', 'Evaluation')}", ""]
    lines += [f"- {key}: {value}" for key, value in evaluation.about.items() if key != "model"]
    lines += [f"- cases: {len(evaluation.cases)}" + (f", {evaluation.failed} of them failed" if evaluation.failed else ""), ""]
    lines += ["| metric | value | 95 % | against | 95 % | p |", "|---|---|---|---|---|---|"]
    for name, found in evaluation.figures.items():
        change = evaluation.differences.get(name)
        versus = f"{figure(name, change.value, True)} | {spread(name, change, True)} | {change.p:.3f}" if change else " | | "
        lines.append(f"| {title(name)} | {figure(name, found.value)} | {spread(name, found)} | {versus} |")
    for name, kinds in evaluation.types.items():
        lines += ["", f"## {title(name)} by {evaluation.about.get('by', 'type')}", "", "| kind | value | 95 % |", "|---|---|---|"]
        lines += [f"| {plain(kind)} | {figure(name, found.value)} | {spread(name, found)} |" for kind, found in kinds.items()]
    for section in sections(evaluation, count, seed):
        lines += ["", f"## {section.title}", "", "| image | asked | answer | right | score |", "|---|---|---|---|---|"]
        for i in section.cases:
            case, scores = evaluation.cases[i], ", ".join(figure(name, float(each[i])) for name, each in evaluation.each.items())
            right = " · ".join(dict.fromkeys(case.right)) if "suffix" in case.row or "answers" in case.row else ""
            pictures = " ".join(f"[{path.name}]({Path(os.path.relpath(path, folder)).as_posix()})" for path in case.images)
            lines.append(f"| {pictures} | {plain(case.row.get('prefix', ''))} | {plain(case.answer)} | {plain(right)} | {scores} |")
    return "\n".join(lines) + "\n"


def save(evaluation: Evaluation, folder: str | Path, count: int = 12, seed: int = 0) -> None:
    """report.html and report.md."""
    (Path(folder) / "report.html").write_text(html(evaluation, count, seed), encoding="utf-8")
    (Path(folder) / "report.md").write_text(markdown(evaluation, count, seed, folder), encoding="utf-8")
