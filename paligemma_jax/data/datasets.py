"""`convert`: a published data set -> JSONL to learn from or to measure on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from paligemma_jax.data import published, refcoco
from paligemma_jax.data.published import JsonRow, PublishedFiles
from paligemma_jax.data.recipes import RECIPES
from paligemma_jax.processing.mask_codec import load_codec

CONVERTERS: dict[str, Callable[[PublishedFiles], Iterator[JsonRow]]] = {
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
    name: str, files: Sequence[str | Path], images: str | Path, output: str | Path, split: str | None = None, prompt: str | None = None,
    every_answer: bool = False, codec: str | Path | None = None,
) -> int:  # fmt: skip
    """Writes the JSONL `output` of the data set `name`, paths relative to it, and returns how many rows there are.

    prompt: another than the recipe's, with {} for the question. every_answer: a row for each answer, as big_vision learns from them in turn.
    codec: the file of the mask codec, so that answers say masks.
    ValueError if a file is not as published, or pictures are not there; then there is no JSONL.
    """
    output = Path(output)
    given = PublishedFiles(
        [Path(file) for file in files], Path(images), prompt or RECIPES[name].prompt, split, output, load_codec(codec) if codec else None
    )
    if gone := [path for path in given.files if not path.is_file()]:
        raise ValueError(f"{gone[0]}: no such file; give what the data set publishes: {CONVERTERS[name].__doc__}")
    try:
        rows = list(CONVERTERS[name](given))
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(f"{', '.join(map(str, files))}: not as published ({type(error).__name__}: {error}); {CONVERTERS[name].__doc__}") from None
    if not rows:
        raise ValueError(f"no rows{f' of split {split}' if split else ''} in {', '.join(map(str, files))}")
    if gone := [image for image in dict.fromkeys(row["image"] for row in rows) if not os.path.exists(image)]:
        raise ValueError(f"{len(gone)} pictures are not there, as {gone[0]}: give their folder with --images")
    if every_answer:
        rows = [row | {"suffix": answer} for row in rows for answer in row.get("answers") or [row["suffix"]]]
    beside = output.with_name(output.name + ".part")
    beside.parent.mkdir(parents=True, exist_ok=True)
    with beside.open("w", encoding="utf-8") as out:
        for row in rows:
            moved = {key: os.path.relpath(row[key], output.parent) for key in ("image", "mask") if key in row}
            out.write(json.dumps(row | moved, ensure_ascii=False) + "\n")
    beside.replace(output)
    return len(rows)
