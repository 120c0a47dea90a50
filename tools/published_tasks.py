"""Write the tables of docs/published-tasks.md from the recipes.

python -m tools.published_tasks
"""

from __future__ import annotations

from pathlib import Path

from paligemma_jax.data.recipes import RECIPES, Recipe, Result, results
from paligemma_jax.data.recipes.recipe import transfer_sources

PAGE = Path(__file__).parents[1] / "docs" / "published-tasks.md"
SIZES = ("3b", "10b", "28b")
START, END = "<!-- {} -->\n\n", "\n<!-- end -->"


def tables() -> dict[str, str]:
    """The tables of the page, by the comment that they follow."""
    head = ["task", "", "pixels", "training", "metric", "sources (? without a second one)"]
    tasks = [_row(head), "|" + "---|" * len(head)]
    tasks += [_task(name, recipe) for name, recipe in RECIPES.items()]
    head = ["task", "result", "pixels", *SIZES, "table"]
    found = [_row(head), "|" + "---|" * len(head)]
    found += [row for name in RECIPES for result in results(name) for row in _result(result)]
    return {"tasks": "\n".join(tasks) + "\n", "results": "\n".join(found) + "\n"}


def fill(page: str) -> str:
    """Return the page with its tables replaced."""
    for name, table in tables().items():
        start = START.format(name)
        before, _, rest = page.partition(start)
        if END not in rest:
            raise ValueError(
                f"{PAGE.name} must have the comments {start.strip()} and {END.strip()}"
            )
        page = before + start + table + rest[rest.index(END) :]
    return page


def _task(name: str, recipe: Recipe) -> str:
    pixels = ", ".join(map(str, recipe.resolutions))
    if recipe.zero_shot_from:
        training = f"zero-shot from `{recipe.zero_shot_from}`"
    else:
        length = f"{recipe.steps:,} steps" if recipe.steps else f"{recipe.epochs:g}"
        length += "" if recipe.steps else " epoch" if recipe.epochs == 1 else " epochs"
        batch = f", batch {recipe.batch_size}" if recipe.batch_size else ""
        training = length + batch + (", encoder frozen" if recipe.frozen else "")
    metrics = ", ".join(
        f"`{metric}`" + (" (none here)" if metric in recipe.missing_metrics else "")
        for metric in recipe.metrics
    )
    cells = [f"`{name}`", recipe.about, pixels, training, metrics, _sources(recipe)]
    return _row(cells)


def _sources(recipe: Recipe) -> str:
    """All sources; those of a transfer of report 1, which the page explains, as one."""
    config = recipe.sources[0].confirmed_by.removeprefix("big_vision ")
    rows, parts = list(recipe.sources), []
    for confirmed in (True, False):
        shared = list(transfer_sources(config, confirmed))
        if rows[: len(shared)] == shared:
            parts, rows = [f"transfer `{config}`"], rows[len(shared) :]
            parts += [] if confirmed else ["learning rates?"]
    for row in rows:
        second = f" = {row.confirmed_by}" if row.confirmed_by else "?"
        parts.append(f"{row.figures}: {row.stated_by.split(':')[0]}{second}")
    return "; ".join(parts)


def _result(result: Result) -> list[str]:
    """A row for each size of image, and then of the first PaliGemma."""
    rows = []
    table = result.source.replace("report ", "").replace(", table ", ".")
    for sizes, of in ((SIZES, ""), (("pg1-3b",), ", PaliGemma 1")):
        for pixels in (224, 448, 896):
            figures = [str(result.figures.get(f"{size}-{pixels}", "")) for size in sizes]
            if any(figures):
                cells = [
                    f"{result.metric.replace('_', ' ')}, {result.title}{of}",
                    str(pixels),
                    *figures,
                ]
                cells += [""] * (len(SIZES) - len(sizes))
                rows.append(_row([f"`{result.task}`", *cells, table]))
    return rows


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    PAGE.write_text(fill(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
