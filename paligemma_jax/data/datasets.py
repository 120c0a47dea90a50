"""Convert published data sets to JSONL for training and evaluation."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from paligemma_jax.data import published, refcoco
from paligemma_jax.data.jsonl import DataRow
from paligemma_jax.data.published import PublishedFiles
from paligemma_jax.data.recipes import RECIPES
from paligemma_jax.processing.mask_codec import load_codec

CONVERTERS: dict[str, Callable[[PublishedFiles], Iterator[DataRow]]] = {
    "textvqa": published.textvqa,
    "vqav2": published.vqav2,
    "docci": published.docci,
    "refcoco-detect": refcoco.refcoco_detect,
    "refcoco-segment": refcoco.refcoco_segment,
    "chartqa": published.chartqa,
    "docvqa": published.docvqa,
    "coco-captions": published.coco_captions,
}


def convert(
    name: str,
    files: Sequence[str | Path],
    images: str | Path,
    output: str | Path,
    split: str | None = None,
    prompt: str | None = None,
    every_answer: bool = False,
    codec: str | Path | None = None,
) -> int:
    """Convert the data set `name` to a JSONL file.

    Args:
        files: As the data set publishes them; see the docstring of its converter.
        images: Directory of the images.
        output: The JSONL to write. Paths in it are relative to it.
        split: Convert only this split, of files that have several.
        prompt: Replaces the prompt of the recipe; {} stands for the question.
        every_answer: Write one row per answer, as big_vision trains on them in turn.
        codec: File of the mask codec, to encode masks in the answers.

    Returns:
        The number of rows.

    Raises:
        ValueError: A file is not as published, or images are missing. Nothing is written then.
    """
    if name not in CONVERTERS:
        raise ValueError(
            f"--files: there is no converter for {name}, only for {', '.join(CONVERTERS)}; "
            "write its rows yourself"
        )
    output, paths, converter = Path(output), [Path(file) for file in files], CONVERTERS[name]
    expected = " ".join((converter.__doc__ or "").split())
    for path in paths:
        if not path.is_file():
            raise ValueError(f"{path}: no such file; {name} is published as: {expected}")
    prompt = prompt or RECIPES[name].prompt
    mask_codec = load_codec(codec) if codec else None
    source = PublishedFiles(paths, Path(images), prompt, split, output, mask_codec)
    names = ", ".join(map(str, files))
    try:
        rows: list[DataRow] = list(converter(source))
    except ValueError as error:
        raise ValueError(f"{error}; {name} is published as: {expected}") from None
    if not rows:
        raise ValueError(f"no rows{f' of split {split}' if split else ''} in {names}")
    check_images(str(row["image"]) for row in rows)
    if every_answer:
        rows = [copy for row in rows for copy in _row_per_answer(row)]
    write_rows(output, rows)
    return len(rows)


def check_images(files: Iterable[str]) -> None:
    """Raise a ValueError if image files are missing."""
    missing = [file for file in dict.fromkeys(files) if not os.path.isfile(file)]
    if missing:
        raise ValueError(
            f"{len(missing)} images are missing, such as {missing[0]}: "
            "pass their directory with --images"
        )


def _row_per_answer(row: DataRow) -> list[DataRow]:
    answers = row.get("answers")
    return [{**row, "suffix": answer} for answer in answers] if answers else [row]


def write_rows(output: Path, rows: list[DataRow]) -> None:
    """Write a JSONL file at once, with paths relative to it."""
    temporary = output.with_name(output.name + ".part")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    with temporary.open("w", encoding="utf-8") as out:
        for row in rows:
            relative = {**row, "image": os.path.relpath(str(row["image"]), output.parent)}
            mask = row.get("mask")
            if mask is not None:
                relative["mask"] = os.path.relpath(mask, output.parent)
            out.write(json.dumps(relative, ensure_ascii=False) + "\n")
    temporary.replace(output)
