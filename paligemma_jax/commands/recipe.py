"""`paligemma-jax recipe`."""

from __future__ import annotations

import difflib
import textwrap
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from paligemma_jax.commands.options import File, dumps, flag

if TYPE_CHECKING:
    from paligemma_jax.data.recipes import Recipe

Task = Annotated[str | None, tyro.conf.Positional, flag("TASK", "a list of all tasks")]
Files = Annotated[tuple[str, ...], flag("FILE [FILE ...]", "none")]
Prompt = Annotated[str | None, flag("TEXT", "the recipe's")]
Split = Annotated[str | None, flag("NAME", "all")]
Pixels = Annotated[int | None, flag("N", "the recipe's lowest")]
SOURCES = (
    "report 1 is arXiv:2407.07726, report 2 arXiv:2412.03555, and big_vision\n"
    "google-research/big_vision at 0127fb6, configs/proj/paligemma/transfers"
)


def recipe(
    task: Task = None,
    size: Literal["3b", "10b", "28b"] = "3b",
    resolution: Pixels = None,
    files: Files = (),
    images: str = ".",
    output: File = None,
    split: Split = None,
    prompt: Prompt = None,
    every_answer: bool = False,
    codec: File = None,
    json: bool = False,
) -> None:
    """List published tasks, show how one was trained, or convert its files to rows.

    Example: paligemma-jax recipe docvqa --resolution 896

    Args:
        task: Name of a task, such as docvqa. Without it, all tasks are listed.
        size: Model size, which determines the learning rate.
        resolution: Image size in pixels.
        files: Files of the data set as published, to convert to --output: for docvqa
            val_v1.0_withQT.json, for vqav2 the questions and the annotations, for refcoco
            refs(unc).p and instances.json. Without files, the recipe is shown.
        images: Directory of the images of --files.
        output: JSONL file to write.
        split: Convert only this split, if the files contain several.
        prompt: Prompt to use instead of the recipe's; {} stands for the question or expression.
        every_answer: Write one row per answer, to train on all of them.
        codec: Mask codec (vae-oid.npz) that refcoco-segment encodes masks with.
        json: Print the recipe, or all of them, as one JSON object.
    """
    from paligemma_jax.data.recipes import RECIPES

    if task is None:
        if files:
            raise ValueError("--files requires the name of a task: see paligemma-jax recipe")
        print(dumps({name: _fields(name) for name in RECIPES}) if json else _list())
        return
    row = find_recipe(task)
    if files:
        from paligemma_jax.data.datasets import convert

        if output is None:
            raise ValueError("--files requires --output, the JSONL file to write")
        rows = convert(task, files, images, output, split, prompt, every_answer, codec)
        print(f"{rows} rows: {output}")
        return
    commands = row.commands(task, size, resolution)
    if json:
        finetune = {} if row.zero_shot_from else row.finetune(size, resolution)
        print(dumps({**_fields(task), "finetune": finetune, "commands": commands.splitlines()}))
    else:
        print(_describe(task, row) + f"\n\n{commands}")


def find_recipe(name: str, flag: str = "TASK") -> Recipe:
    """Return the recipe of a task; raise ValueError with similar names if there is none."""
    from paligemma_jax.data.recipes import RECIPES

    if name in RECIPES:
        return RECIPES[name]
    close = difflib.get_close_matches(name, RECIPES, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    raise ValueError(
        f"{flag} must be the name of a published task, got {name}: "
        f"{hint}`paligemma-jax recipe` lists all {len(RECIPES)}"
    )


def _fields(name: str) -> dict[str, object]:
    """Everything about a task, for JSON."""
    from paligemma_jax.data.recipes import RECIPES, results

    row = RECIPES[name]
    fields = {**asdict(row), "missing_metrics": list(_missing(row))}
    return {"name": name, **fields, "published": [asdict(result) for result in results(name)]}


def _missing(row: Recipe) -> list[str]:
    """The published metrics that are not computed here."""
    from paligemma_jax.metrics.registry import GROUPS, METRICS

    return [name for name in row.missing_metrics if name not in METRICS and name not in GROUPS]


def scored_metrics(name: str, row: Recipe) -> tuple[str, ...]:
    """The metrics of a task that `evaluate` computes; raise ValueError if there is none."""
    missing = _missing(row)
    metrics = tuple(metric for metric in row.metrics if metric not in missing)
    if not metrics:
        named = ", ".join(row.metrics) or "the metrics of its tasks"
        raise ValueError(
            f"--recipe {name} is scored by {named}, which evaluate does not compute: pass --metric"
        )
    return metrics


def _list() -> str:
    from paligemma_jax.data.recipes import RECIPES

    lines = []
    for name, row in RECIPES.items():
        pixels = "/".join(map(str, row.resolutions))
        lines.append((name, pixels, " ".join(row.metrics) or "-", row.about))
    widths = [max(len(line[i]) for line in lines) for i in range(3)]
    return "\n".join(
        "  ".join(
            [*(text.ljust(width) for text, width in zip(line, widths, strict=False)), line[3]]
        )
        for line in lines
    )


def _describe(name: str, row: Recipe) -> str:
    """The row as text, one paragraph per group of fields."""
    pixels = ", ".join(map(str, row.resolutions))
    count = f"{row.images} per row; " if row.images > 1 else ""
    lines = {
        "prompt": row.prompt,
        "images": f"{count}{row.preprocessing}; {pixels} pixels",
        "training": _training(row),
        "learning rate": _rates(row),
        "by pixels": "; ".join(
            f"{pixels}: {', '.join(f'{k} {v}' for k, v in values.items())}"
            for pixels, values in row.overrides.items()
        ),
        "decoding": ("greedy" if row.beams == 1 else f"beam search of width {row.beams}")
        + (f", at most {row.new_tokens} tokens" if row.new_tokens else ""),
        "metrics": ", ".join(row.metrics) or "those of the tasks",
        "no metric here": ", ".join(_missing(row)),
        "note": row.note,
    }
    text = [f"{name}: {row.about}", ""]
    text += [_wrap(f"{key:15}{value}", 15) for key, value in lines.items() if value]
    text += ["", "Sources (? if no second source confirms the figures)"]
    for source in row.sources:
        second = f"; confirmed by {source.confirmed_by}" if source.confirmed_by else " ?"
        text.append(_wrap(f"  {source.figures}: {source.stated_by}{second}", 4))
    text += ["", "Published results", *(_published(name) or ["  none"])]
    return "\n".join([*text, "", SOURCES])


def _wrap(text: str, indent: int) -> str:
    return textwrap.fill(text, 80, subsequent_indent=" " * indent, break_on_hyphens=False)


def _training(row: Recipe) -> str:
    if row.zero_shot_from:
        return f"none: zero-shot, with the model of {row.zero_shot_from}"
    values = {
        "epochs": row.epochs,
        "steps": row.steps,
        "batch size": row.batch_size,
        "weight decay": row.weight_decay,
        "dropout": row.dropout,
        "label smoothing": row.label_smoothing,
    }
    del values["steps" if row.epochs else "epochs"]
    parts = [f"{k} {'not published' if v is None else f'{v:g}'}" for k, v in values.items()]
    parts.append(f"frozen: {row.frozen}" if row.frozen else "all parts trained")
    if row.answers > 1:
        parts.append(f"about {row.answers} answers per question or image, each a row")
    return ", ".join(parts)


def _rates(row: Recipe) -> str:
    if row.zero_shot_from:
        return ""
    return ", ".join(f"{k} {v:g}" for k, v in row.learning_rate.items()) or "not published"


def _published(name: str) -> list[str]:
    """The published results, a line per metric, split and image size."""
    from paligemma_jax.data.recipes import results

    lines = []
    for result in results(name):
        lines.append(f"  {result.metric}, {result.title} ({result.source})")
        by_pixels: dict[str, list[str]] = {}
        for model, figure in result.figures.items():
            size, pixels = model.rsplit("-", 1)
            by_pixels.setdefault(pixels, []).append(f"{size} {figure}")
        lines += [f"    {pixels}: {', '.join(each)}" for pixels, each in by_pixels.items()]
    return lines
