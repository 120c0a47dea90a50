"""Rows of data with their answers, and what each metric compares of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from paligemma_jax.inference.offline_files import output_files
from paligemma_jax.metrics import captions, registry
from paligemma_jax.metrics.scores import Metric, Scores
from paligemma_jax.processing.locations import (
    Box,
    Detection,
    Detections,
    parse_detections,
    with_masks,
)
from paligemma_jax.processing.mask_codec import NO_CODEC, MaskCodec


@dataclass(frozen=True)
class Case:
    """A row with its answer. What is right is in "answers" (texts), "boxes" with "labels" (pixels), "mask" (a picture), or else in "suffix"."""

    row: dict[str, Any]
    folder: Path  # that its files are relative to

    @property
    def answer(self) -> str:
        return self.row.get("answer", "")

    @property
    def images(self) -> list[Path]:
        named = self.row["image"]
        return [self.folder / image for image in (named if isinstance(named, list) else [named])]

    @property
    def right(self) -> list[str]:
        found = self.row.get("answers", self.row.get("suffix"))
        if found is None:
            raise ValueError(f"the row about {self.row['image']} says neither answers nor suffix: there is nothing to compare with")
        return found if isinstance(found, list) else [found]

    @cached_property
    def size(self) -> tuple[int, int]:
        with Image.open(self.images[0]) as image:
            return image.size

    @cached_property
    def found(self) -> Detections:
        """What the answer points at, with scores where "pieces" tells the log-probabilities of its tokens."""
        return parse_detections([(piece, value) for piece, value in self.row["pieces"]] if self.row.get("pieces") else self.answer, self.size)

    @cached_property
    def wanted(self) -> list[Detection]:
        if "boxes" not in self.row:
            only_a_mask = "mask" in self.row and not {"answers", "suffix"} & self.row.keys()
            return [] if only_a_mask else parse_detections(self.right[0], self.size)
        boxes = self.row["boxes"]
        return [Detection(label, tuple(box)) for label, box in zip(self.row.get("labels", [""] * len(boxes)), boxes, strict=True)]

    def drawings(self, codec: MaskCodec | None) -> dict[str, list[Detection]]:
        """What to draw of what is right and of what was answered; masks where there is a codec."""
        right, found = list(self.wanted), list(self.found)
        if codec is not None:
            right, found = (list(with_masks(Detections(things), self.size, codec)) for things in (right, found))
        if "mask" in self.row:
            mask = self.wanted_mask(codec)
            right = [replace(right[0], mask=mask), *right[1:]] if right else [Detection("", _around(mask), mask=mask)]
        return {"right": right, "answered": found}

    def mask(self, codec: MaskCodec | None) -> np.ndarray | None:
        """bool[H, W] that the answer says first, if it says any."""
        return _mask(self.found, self.size, codec)

    def wanted_mask(self, codec: MaskCodec | None) -> np.ndarray:
        if "mask" in self.row:
            if not (file := self.folder / self.row["mask"]).is_file():
                raise ValueError(f"the row about {self.row['image']}: no mask at {file}")
            return np.asarray(Image.open(file).convert("L")) > 127
        mask = _mask(self.wanted, self.size, codec)
        if mask is None:
            raise ValueError(f"the row about {self.row['image']} says no mask, neither as a file nor as <seg> in its suffix")
        return mask


def _around(mask: np.ndarray) -> Box:
    """Left, top, right, bottom of a mask."""
    columns, rows = (np.flatnonzero(mask.any(axis=axis)) for axis in (0, 1))
    return (float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)) if len(rows) else (0.0, 0.0, 0.0, 0.0)


def _mask(things: Sequence[Detection], size: tuple[int, int], codec: MaskCodec | None) -> np.ndarray | None:
    if not things or not things[0].codes:
        return None
    if codec is None:
        raise ValueError(NO_CODEC)
    return with_masks(Detections(things[:1]), size, codec)[0].mask


# ---- What each metric is given


class Lazily(Sequence):
    """Values made when they are asked for, one at a time: masks would fill the memory."""

    def __init__(self, make: Callable[[Case], Any], cases: Sequence[Case]):
        self.make, self.cases = make, cases

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, index: Any) -> Any:
        return self.make(self.cases[index])


Sides = tuple[Sequence[Any], Sequence[Any]]


def _texts(cases: Sequence[Case], codec: MaskCodec | None) -> Sides:
    return [case.answer for case in cases], [case.right for case in cases]


def _things(cases: Sequence[Case], codec: MaskCodec | None) -> Sides:
    if not any(case.wanted for case in cases):
        raise ValueError('no row has a box to find: this metric needs "boxes" in the rows, or <loc> in their suffix')
    return [case.found for case in cases], [case.wanted for case in cases]


def _boxes(cases: Sequence[Case], codec: MaskCodec | None) -> Sides:
    if bare := [case for case in cases if not case.wanted]:
        raise ValueError(f"the row about {bare[0].row['image']} has no box to find: take --metric coco for any number of them")
    return [case.found[0].box if case.found else None for case in cases], [case.wanted[0].box for case in cases]


def _masks(cases: Sequence[Case], codec: MaskCodec | None) -> Sides:
    return Lazily(lambda case: case.mask(codec), cases), Lazily(lambda case: case.wanted_mask(codec), cases)


READERS: dict[str, Callable[[Sequence[Case], MaskCodec | None], Sides]] = {
    **dict.fromkeys(("average_precision", "ap50", "ap75"), _things),
    **dict.fromkeys(("box_accuracy", "box_iou"), _boxes),
    "mask_iou": _masks,
}
METRICS: dict[str, Metric] = {name: one for name in registry.__all__ if isinstance(one := getattr(registry, name), Metric) and name != "non_entailment"}
GROUPS = {"pope": tuple(name for name in METRICS if name.startswith("pope_")), "coco": ("average_precision", "ap50", "ap75")}
POINTING = frozenset(READERS)  # metrics of what is drawn


def metric_names(asked: Sequence[str]) -> list[str]:
    """Metrics by name, groups of them taken apart, each once. ValueError for one that there is not."""
    known = ", ".join([*METRICS, *GROUPS])
    if strange := [name for name in asked if name not in METRICS and name not in GROUPS]:
        raise ValueError(f"--metric {strange[0]}: there are {known}")
    if not asked:
        raise ValueError(f"no --metric: there are {known}")
    if "bleu" in asked:
        captions.sacrebleu()
    return list(dict.fromkeys(single for name in asked for single in GROUPS.get(name, (name,))))


def score_cases(name: str, cases: Sequence[Case], codec: MaskCodec | None = None) -> Scores:
    predictions, references = READERS.get(name, _texts)(cases, codec)
    return METRICS[name].scores(predictions, references)


# ---- From files


def collect(data: Path, folder: Path) -> list[Case]:
    """Every row of `data` with what `predict` wrote of it into `folder`, in one part or several; a row that failed has the answer "" and its error.

    ValueError if the run is not finished.
    """
    failed = {record["line"]: record["error"] for file in output_files(folder, "errors") for record in _lines(file)}
    answered = (row for file in output_files(folder, "answers") for row in _lines(file))
    cases = []
    with data.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            if number in failed:
                row = _load(line, f"{data}: line {number}")
                cases.append(Case(row | {"answer": "", "error": failed[number]}, data.parent))
            elif row := next(answered, None):
                cases.append(Case(row, data.parent))
            else:
                raise ValueError(f"{folder} is not finished, {data} has rows without an answer yet: --resume to answer the rest")
    return cases


def load(file: Path, data: Path) -> list[Case]:
    """The rows of `data` as anybody answered them: JSONL with "answer" in each. ValueError if they are not all there."""
    rows = _lines(file)
    if bare := [number for number, row in enumerate(rows, 1) if not isinstance(row.get("answer"), str)]:
        raise ValueError(f"{file}: row {bare[0]} has no answer")
    cases = [Case(row, data.parent) for row in rows]
    same_rows([Case(row, data.parent) for row in _lines(data)], cases, str(file))
    return cases


def _lines(file: Path) -> list[dict[str, Any]]:
    if not file.is_file():
        raise ValueError(f"{file}: no such file; give JSONL of rows with their answers, as predict writes it")
    with file.open(encoding="utf-8") as lines:
        return [_load(line, f"{file}: line {number}") for number, line in enumerate(lines, 1) if line.strip()]


def _load(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON ({error})") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where} is not an object")
    if not isinstance(row.get("mask", ""), str):
        raise ValueError(f'{where}: "mask" is {row["mask"]!r}, not the name of a picture')
    if not (isinstance(boxes := row.get("boxes", []), list) and all(_is_box(box) for box in boxes)):
        raise ValueError(f'{where}: "boxes" is {boxes!r}, not a list of [left, top, right, bottom]')
    return row


def _is_box(box: Any) -> bool:
    return isinstance(box, list) and len(box) == 4 and all(isinstance(side, int | float) for side in box)


def same_rows(ours: Sequence[Case], theirs: Sequence[Case], name: str) -> None:
    """ValueError where the rows of `name`, which are theirs, are not about the same as ours in the same order."""
    about = lambda case: (case.row.get("image"), case.row.get("prefix"))
    if other := [i for i, (a, b) in enumerate(zip(ours, theirs), 1) if about(a) != about(b)]:
        raise ValueError(f"{name} is about other rows: row {other[0]} is {about(theirs[other[0] - 1])}, not {about(ours[other[0] - 1])}")
    if len(ours) != len(theirs):
        raise ValueError(f"{name} has {len(theirs)} rows, not {len(ours)}")


def enlarged(thing: Detection, factor: float, size: tuple[int, int]) -> Detection:
    """With its picture, which then is of `size`."""
    left, top, right, bottom = (value * factor for value in thing.box)
    mask = None if thing.mask is None else np.asarray(Image.fromarray(thing.mask).resize(size, Image.Resampling.NEAREST))
    return replace(thing, box=(left, top, right, bottom), mask=mask)
