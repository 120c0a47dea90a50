"""Rows of a data set with the answers of a model, and their references."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from paligemma_jax.data.images import image_size
from paligemma_jax.data.jsonl import DataRow
from paligemma_jax.data.shapes import mask_box
from paligemma_jax.processing.image import ImageSource
from paligemma_jax.processing.locations import Detection, Detections, parse_detections, with_masks
from paligemma_jax.processing.mask_codec import NO_CODEC, MaskCodec


class AnsweredRow(DataRow, total=False):
    """A row with the model's answer."""

    answer: str
    pieces: list[tuple[str, float]] | None  # text and log-probability of each token
    error: str


@dataclass(frozen=True)
class Case:
    """A row with its answer.

    The reference is in "answers" (strings), in "boxes" with "labels" (pixels), in "mask" (an
    image), or else in "suffix".
    """

    row: AnsweredRow
    folder: Path  # base of the paths in the row
    failed: bool = False  # the row has an "error" instead of an answer

    @property
    def answer(self) -> str:
        return self.row.get("answer", "")

    @property
    def images(self) -> list[ImageSource]:
        image = self.row["image"]
        images = image if isinstance(image, list) else [image]
        return [self.folder / x if isinstance(x, str) else x for x in images]

    @property
    def has_text(self) -> bool:
        """Whether there are reference answers."""
        return any(self.row.get(name) is not None for name in ("answers", "suffix"))

    @property
    def references(self) -> list[str]:
        """All correct answers."""
        references = self.row.get("answers")
        if references is None:
            references = self.row.get("suffix")
        if references is None or references == []:
            raise ValueError(f"{self.name} has no reference: add answers or suffix")
        return references if isinstance(references, list) else [references]

    @cached_property
    def size(self) -> tuple[int, int]:
        """Width and height of the image."""
        return image_size(self.images[0])

    @cached_property
    def detections(self) -> Detections:
        """The objects in the answer, with scores if the row has "pieces"."""
        pieces = self.row.get("pieces")
        text = [(piece, value) for piece, value in pieces] if pieces else self.answer
        return parse_detections(text, self.size)

    @cached_property
    def reference_detections(self) -> list[Detection]:
        """The reference objects."""
        boxes = self.row.get("boxes")
        if boxes is not None:
            labels = self.row.get("labels") or [""] * len(boxes)
            if len(labels) != len(boxes):
                raise ValueError(f"{self.name} has {len(boxes)} boxes, but {len(labels)} labels")
            pairs = zip(labels, boxes, strict=True)
            return [Detection(label, (box[0], box[1], box[2], box[3])) for label, box in pairs]
        if self.row.get("mask") and not self.has_text:
            return []
        return parse_detections(self.references[0], self.size)

    def mask(self, codec: MaskCodec | None) -> np.ndarray | None:
        """bool[H, W]: the first mask in the answer, if any."""
        return _first_mask(self.detections, self.size, codec)

    def reference_mask(self, codec: MaskCodec | None) -> np.ndarray:
        """bool[H, W]: the reference mask."""
        path = self.row.get("mask")
        if path is not None:
            file = self.folder / path
            if not file.is_file():
                raise ValueError(f"{self.name}: no mask at {file}")
            return np.asarray(Image.open(file).convert("L")) > 127
        mask = _first_mask(self.reference_detections, self.size, codec)
        if mask is None:
            raise ValueError(f"{self.name} has no mask: add mask, or <seg> tokens in suffix")
        return mask

    def drawings(self, codec: MaskCodec | None) -> dict[str, list[Detection]]:
        """The objects to draw as reference and as answer; with masks if there is a codec."""
        references, answer = list(self.reference_detections), list(self.detections)
        if codec is not None:
            references = list(with_masks(Detections(references), self.size, codec))
            answer = list(with_masks(Detections(answer), self.size, codec))
        if self.row.get("mask") is not None:
            mask = self.reference_mask(codec)
            first = references[0] if references else Detection("", mask_box(mask))
            references = [replace(first, mask=mask), *references[1:]]
        return {"reference": references, "answer": answer}

    @property
    def name(self) -> str:
        """The row in an error. Only an image that is a file has a name."""
        image = self.row.get("image")
        return f"the row of {image}" if isinstance(image, str | Path) else "a row"


def _first_mask(
    detections: Sequence[Detection], size: tuple[int, int], codec: MaskCodec | None
) -> np.ndarray | None:
    if not detections or not detections[0].codes:
        return None
    if codec is None:
        raise ValueError(NO_CODEC)
    return with_masks(Detections(detections[:1]), size, codec)[0].mask
