"""Rows of a data set with the answers of a run, and their references."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from paligemma_jax.data.jsonl import DataRow, read_jsonl
from paligemma_jax.inference.offline_files import output_files
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
    """A row with its answer.

    The reference is in "answers" (strings), in "boxes" with "labels" (pixels), in "mask" (an
    image), or else in "suffix".
    """

    row: DataRow
    folder: Path  # base of the paths in the row

    @property
    def answer(self) -> str:
        return self.row.get("answer", "")

    @property
    def images(self) -> list[Path]:
        image = self.row["image"]
        return [self.folder / path for path in (image if isinstance(image, list) else [image])]

    @property
    def has_text(self) -> bool:
        """Whether there are reference answers."""
        return "answers" in self.row or "suffix" in self.row

    @property
    def references(self) -> list[str]:
        """All correct answers."""
        references = self.row.get("answers", self.row.get("suffix"))
        if references is None:
            raise ValueError(f"{self._name} has no reference: add answers or suffix")
        return references if isinstance(references, list) else [references]

    @cached_property
    def size(self) -> tuple[int, int]:
        """Width and height of the image."""
        with Image.open(self.images[0]) as image:
            return image.size

    @cached_property
    def detections(self) -> Detections:
        """The objects in the answer, with scores if the row has "pieces"."""
        pieces = self.row.get("pieces")
        text = [(piece, value) for piece, value in pieces] if pieces else self.answer
        return parse_detections(text, self.size)

    @cached_property
    def reference_detections(self) -> list[Detection]:
        """The reference objects."""
        if "boxes" in self.row:
            boxes = self.row["boxes"]
            labels = self.row.get("labels", [""] * len(boxes))
            pairs = zip(labels, boxes, strict=True)
            return [Detection(label, (box[0], box[1], box[2], box[3])) for label, box in pairs]
        if "mask" in self.row and not self.has_text:
            return []
        return parse_detections(self.references[0], self.size)

    def mask(self, codec: MaskCodec | None) -> np.ndarray | None:
        """bool[H, W]: the first mask in the answer, if any."""
        return _first_mask(self.detections, self.size, codec)

    def reference_mask(self, codec: MaskCodec | None) -> np.ndarray:
        """bool[H, W]: the reference mask."""
        if "mask" in self.row:
            file = self.folder / self.row["mask"]
            if not file.is_file():
                raise ValueError(f"{self._name}: no mask at {file}")
            return np.asarray(Image.open(file).convert("L")) > 127
        mask = _first_mask(self.reference_detections, self.size, codec)
        if mask is None:
            raise ValueError(f"{self._name} has no mask: add mask, or <seg> tokens in suffix")
        return mask

    def drawings(self, codec: MaskCodec | None) -> dict[str, list[Detection]]:
        """The objects to draw as reference and as answer; with masks if there is a codec."""
        references, answer = list(self.reference_detections), list(self.detections)
        if codec is not None:
            references = list(with_masks(Detections(references), self.size, codec))
            answer = list(with_masks(Detections(answer), self.size, codec))
        if "mask" in self.row:
            mask = self.reference_mask(codec)
            first = references[0] if references else Detection("", _bounding_box(mask))
            references = [replace(first, mask=mask), *references[1:]]
        return {"reference": references, "answer": answer}

    @property
    def _name(self) -> str:
        return f"the row of {self.row['image']}"


def _bounding_box(mask: np.ndarray) -> Box:
    """Return left, top, right, bottom."""
    columns, rows = (np.flatnonzero(mask.any(axis=axis)) for axis in (0, 1))
    if not len(rows):
        return 0.0, 0.0, 0.0, 0.0
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def _first_mask(
    detections: Sequence[Detection], size: tuple[int, int], codec: MaskCodec | None
) -> np.ndarray | None:
    if not detections or not detections[0].codes:
        return None
    if codec is None:
        raise ValueError(NO_CODEC)
    return with_masks(Detections(detections[:1]), size, codec)[0].mask


# ---- From files


def collect(data: Path, folder: Path) -> list[Case]:
    """The rows of `data` with the answers that `predict` wrote to `folder`, in one part or several.

    A row that failed has the answer "" and its error.

    Raises:
        ValueError: The run is not finished.
    """
    errors: dict[int, str] = {}
    for file in output_files(folder, "errors"):
        for _, record in read_jsonl(file):
            errors[record["line"]] = record["error"]  # type: ignore[typeddict-item]
    answers = (row for file in output_files(folder, "answers") for row in _read_rows(file))
    rows: list[DataRow] = []
    for number, row in read_jsonl(data):
        if number in errors:
            _check_row(row, f"{data}: line {number}")
            rows.append({**row, "answer": "", "error": errors[number]})
            continue
        answered = next(answers, None)
        if answered is None:
            raise ValueError(
                f"{folder} is not finished: rows of {data} have no answer yet; "
                "use --resume to answer the rest"
            )
        rows.append(answered)
    return [Case(row, data.parent) for row in rows]


def load_answers(file: Path, data: Path) -> list[Case]:
    """The rows of `data` with an "answer" from any source, from a JSONL file.

    Raises:
        ValueError: An answer is missing, or the rows are not those of `data`.
    """
    rows = _read_rows(file)
    for number, row in enumerate(rows, 1):
        if not isinstance(row.get("answer"), str):
            raise ValueError(f"{file}: row {number} has no answer")
    cases = [Case(row, data.parent) for row in rows]
    check_same_rows([Case(row, data.parent) for row in _read_rows(data)], cases, str(file))
    return cases


def check_same_rows(ours: Sequence[Case], theirs: Sequence[Case], name: str) -> None:
    """Raise a ValueError unless the rows of the other run, `name`, match ours in order."""
    for number, cases in enumerate(zip(ours, theirs, strict=False), 1):
        mine, other = [(case.row.get("image"), case.row.get("prefix")) for case in cases]
        if mine != other:
            raise ValueError(f"{name} has different rows: row {number} is {other}, expected {mine}")
    if len(ours) != len(theirs):
        raise ValueError(f"{name} has {len(theirs)} rows, expected {len(ours)}")


def _read_rows(file: Path) -> list[DataRow]:
    rows = []
    for number, row in read_jsonl(file):
        _check_row(row, f"{file}: line {number}")
        rows.append(row)
    return rows


def _check_row(row: DataRow, name: str) -> None:
    if not isinstance(row.get("mask", ""), str):
        raise ValueError(f'{name}: "mask" must be the path of an image, got {row.get("mask")!r}')
    boxes = row.get("boxes", [])
    if not isinstance(boxes, list) or not all(map(_is_box, boxes)):
        raise ValueError(
            f'{name}: "boxes" must be a list of [left, top, right, bottom], got {boxes!r}'
        )


def _is_box(box: object) -> bool:
    return (
        isinstance(box, list)
        and len(box) == 4
        and all(isinstance(value, int | float) for value in box)
    )
