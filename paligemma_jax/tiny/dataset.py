"""Data sets of held-out digits, to evaluate `tiny` on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from PIL import Image

from paligemma_jax.tiny.questions import ask, heldout_scenes
from paligemma_jax.tiny.scenes import Scenes

Task = Literal["caption", "ocr", "count", "detect", "segment"]


def write_digits(
    output: str,
    tasks: tuple[Task, ...] = ("caption", "ocr", "count", "detect", "segment"),
    rows: int = 100,
    seed: int = 0,
) -> Path:
    """Write images of held-out digits, and TASK.jsonl with questions and answers for each task.

    The "type" of a row is the number of digits in its image.

    Args:
        output: Directory to write to.
        tasks: Tasks to write. Rows of segment have masks of the ink, and there are fewer of them:
            only digits that occur once are segmented.
        rows: Images for each task.
        seed: Seed of the images.
    """
    if rows < 1:
        raise ValueError(f"--rows must be at least 1, got {rows}")
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    for task in tasks:
        scenes, digits = heldout_scenes(task, rows, seed)
        lines = []
        for i, digit in enumerate(digits):
            matches = np.flatnonzero(scenes.labels[i] == digit)
            if task == "segment" and len(matches) != 1:
                continue
            row = _row(scenes, i, task, digit, matches)
            Image.fromarray(scenes.images[i]).save(folder / row["image"])
            if task == "segment" and scenes.masks is not None:
                row["mask"] = f"segment-{i}-mask.png"
                ink = scenes.masks[i, matches[0]].astype(np.uint8) * 255
                Image.fromarray(ink).save(folder / row["mask"])
            lines.append(json.dumps(row) + "\n")
        (folder / f"{task}.jsonl").write_text("".join(lines))
    return folder


def _row(scenes: Scenes, index: int, task: str, digit: int, matches: np.ndarray) -> dict:
    """A row of the JSONL file. To detect and segment it has the boxes and labels of `matches`."""
    prompt, answer = ask(scenes, index, task, digit)
    count = len(scenes.digits(index))
    row: dict = {
        "image": f"{task}-{index}.png",
        "prefix": prompt,
        "suffix": answer,
        "type": f"{count} digit{'s' if count > 1 else ''}",
    }
    if task in ("detect", "segment"):
        boxes = scenes.boxes[index][matches].tolist()
        row["boxes"] = [[x0, y0, x1, y1] for y0, x0, y1, x1 in boxes]
        row["labels"] = [str(label) for label in scenes.labels[index][matches]]
    return row


def main() -> None:
    print(tyro.cli(write_digits, prog="python -m paligemma_jax.tiny.dataset"))


if __name__ == "__main__":
    from paligemma_jax.errors import report_errors

    report_errors(main)
