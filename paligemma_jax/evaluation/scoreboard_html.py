"""Render a scoreboard as text and as one self-contained HTML file."""

from __future__ import annotations

import math
from html import escape
from pathlib import Path

from paligemma_jax.data.recipes import RECIPES
from paligemma_jax.evaluation.html import PAGE
from paligemma_jax.evaluation.report import Z_NOTE
from paligemma_jax.evaluation.scoreboard import Board, Entry

COLUMNS = ("task", "model", "split", "metric", "value", "published", "difference", "z")
# The picture, in units of its own: names on the left, and z on a scale that is linear near 0 and
# logarithmic beyond.
WIDTH, LEFT, ROW, TOP = 360, 172, 26, 24
FARTHEST = 30.0  # z beyond is drawn at the edge
TICKS = (-10, -2, 0, 2, 10)


def text(board: Board) -> str:
    """Return the board as aligned columns, then the problems."""
    rows = [list(COLUMNS), *(_cells(entry) for entry in board.entries)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join([*(lines if board.entries else []), *board.problems])


def html(board: Board, title: str) -> str:
    """Return the board as a page with one picture and one table."""
    count = len({entry.task for entry in board.entries})
    note = f"{count} of {len(RECIPES)} tasks. {Z_NOTE}"
    parts = [f"<header><h1>{escape(title)}</h1><p class='note'>{note}</p></header>"]
    if board.entries:
        parts += [_picture(board.entries), _table(board.entries)]
    if board.problems:
        items = "".join(f"<li>{escape(problem)}</li>" for problem in board.problems)
        parts.append(f"<section><h2>Not on the board</h2><ul>{items}</ul></section>")
    names = ", ".join(board.not_evaluated)
    parts.append(f"<section><h2>Not evaluated</h2><p class='note'>{names}</p></section>")
    style = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    return PAGE.format(title=escape(title), style=style, body="\n".join(parts))


def _cells(entry: Entry) -> list[str]:
    model, result = f"{entry.size}-{entry.resolution}", entry.result
    return [entry.task, model, result.split, entry.title, *result.cells(marked=True)]


def _table(entries: tuple[Entry, ...]) -> str:
    rows = ["<tr>" + "".join(f"<th>{name}</th>" for name in COLUMNS) + "</tr>"]
    for entry in entries:
        task, *cells = map(escape, _cells(entry))
        named = list(zip(COLUMNS[1:], cells, strict=True))
        columns = "".join(
            f"<td class='number' title='{name}'>{cell}</td>" for name, cell in named[:-1]
        )
        z = f"<td class='number {entry.verdict}' title='z'>{cells[-1]}</td>"
        rows.append(f"<tr title='{escape(entry.folder)}'><th>{task}</th>{columns}{z}</tr>")
    return f"<section><h2>Results</h2><table class='published'>{''.join(rows)}</table></section>"


def _place(z: float) -> float:
    """The horizontal place of z in the picture."""
    share = math.asinh(max(-FARTHEST, min(FARTHEST, z))) / math.asinh(FARTHEST)
    return LEFT + (WIDTH - 8 - LEFT) * (share + 1) / 2


def _picture(entries: tuple[Entry, ...]) -> str:
    height = TOP + ROW * len(entries) + 4
    low, high = _place(-2), _place(2)
    parts = [
        f"<rect class='band' x='{low:.1f}' y='{TOP - 6}' width='{high - low:.1f}' "
        f"height='{height}'/>"
    ]
    for tick in TICKS:
        x = _place(tick)
        parts.append(f"<line x1='{x:.1f}' x2='{x:.1f}' y1='{TOP - 6}' y2='{height}'/>")
        parts.append(_text("tick", x, 12, str(tick or "z = 0")))
    parts += [_mark(entry, TOP + ROW * (i + 0.5)) for i, entry in enumerate(entries)]
    label = "z of every result: difference from the published mean in published deviations"
    svg = (
        f"<svg class='board' viewBox='0 0 {WIDTH} {height}' role='img' aria-label='{label}'>"
        f"{''.join(parts)}</svg>"
    )
    note = f"Beyond ±1 the scale is nearly logarithmic. Triangles are beyond ±{FARTHEST:g}."
    heading = "<h2>Difference from the published results</h2>"
    return f"<section>{heading}{svg}<p class='note'>{note}</p></section>"


def _mark(entry: Entry, y: float) -> str:
    """One row of the picture: the name, and a dot at z, or the difference if there is no z."""
    result = entry.result
    below = f"{entry.size}-{entry.resolution}, {result.split}"
    name = _text("task", 0, y, entry.task) + _text("split", 0, y + 10, below[:38])
    if result.z is None:
        return name + _text("tick", _place(0), y + 4, f"{result.difference:+.1f}, no z")
    x, title = _place(result.z), f"<title>{escape(entry.task)}: {escape(str(result))}</title>"
    if abs(result.z) <= FARTHEST:
        shape = f"<circle class='{entry.verdict}' cx='{x:.1f}' cy='{y:.1f}' r='4'>"
        return f"{name}{shape}{title}</circle>"
    side = math.copysign(5, result.z)
    points = f"{x - side:.1f},{y - 5:.1f} {x - side:.1f},{y + 5:.1f} {x + side:.1f},{y:.1f}"
    return f"{name}<polygon class='{entry.verdict}' points='{points}'>{title}</polygon>"


def _text(kind: str, x: float, y: float, text: str) -> str:
    return f"<text class='{kind}' x='{x:.1f}' y='{y:.1f}'>{escape(text)}</text>"
