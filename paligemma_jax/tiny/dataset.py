"""The digits that `tiny` never saw, as data sets to measure it on: `python -m paligemma_jax.tiny.dataset --output digits`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import tyro
from PIL import Image

if TYPE_CHECKING:
    from paligemma_jax.tiny.digits import Scenes

Task = Literal["caption", "ocr", "count", "detect", "segment"]


def write_digits(output: str, tasks: tuple[Task, ...] = ("caption", "ocr", "count", "detect", "segment"), rows: int = 100, seed: int = 0) -> Path:
    """Write pictures of held-out digits with questions and answers: TASK.jsonl for each task; type is the number of digits in a picture.

    Args:
        output: The folder.
        tasks: What is asked. segment asks for digits that are there once, and has their ink as masks.
        rows: Pictures of each task.
        seed: Of the pictures.
    """
    from paligemma_jax.tiny import digits

    if rows < 1:
        raise ValueError(f"--rows {rows}: it can be 1 or more")
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    for task in tasks:
        scenes, asked = digits.heldout_scenes(task, rows, seed)
        lines = []
        for i, digit in enumerate(asked):
            prompt, answer = digits.ask(scenes, i, task, digit)
            count = len(scenes.digits(i))
            row = {"image": f"{task}-{i}.png", "prefix": prompt, "suffix": answer, "type": f"{count} digit{'s' * (count > 1)}"}
            places = np.flatnonzero(scenes.labels[i] == digit)
            if task == "segment" and len(places) != 1:
                continue
            if task in ("detect", "segment"):
                row |= _places(scenes, i, places, folder / f"segment-{i}-mask.png" if task == "segment" else None)
            Image.fromarray(scenes.images[i]).save(folder / row["image"])
            lines.append(row)
        (folder / f"{task}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def _places(scenes: Scenes, index: int, places: np.ndarray, mask: Path | None) -> dict[str, Any]:
    """The boxes (left, top, right, bottom) and labels at `places`, and the ink of the first, written into the file `mask`."""
    boxes = [[x0, y0, x1, y1] for y0, x0, y1, x1 in scenes.boxes[index][places].tolist()]
    found: dict[str, Any] = {"boxes": boxes, "labels": [str(label) for label in scenes.labels[index][places]]}
    if mask and scenes.masks is not None:
        Image.fromarray(scenes.masks[index, places[0]].astype(np.uint8) * 255).save(mask)
        found["mask"] = mask.name
    return found


if __name__ == "__main__":
    from paligemma_jax.errors import report_errors

    report_errors(lambda: print(tyro.cli(write_digits, prog="python -m paligemma_jax.tiny.dataset")))
