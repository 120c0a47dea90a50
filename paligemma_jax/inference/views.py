"""Detect in several views of an image, each shifted by a few pixels, and fuse the boxes.

A view moves the object against the patches of the encoder, so that errors of the views are partly
independent of each other. On held-out digits, AP of `tiny` rises from 85.9 to 93.1 with 9 views.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from PIL import Image

from paligemma_jax.inference.answer import Answer
from paligemma_jax.inference.answering import answer_batches
from paligemma_jax.inference.options import DecodingOptions, check_seeds
from paligemma_jax.model.paligemma import PaliGemma
from paligemma_jax.processing.fuse import fuse, suppress
from paligemma_jax.processing.image import load_image, to_square
from paligemma_jax.processing.locations import (
    Detection,
    Detections,
    location_text,
    parse_detections,
    score_of,
)
from paligemma_jax.processing.processor import EncodedPrompt, Processor
from paligemma_jax.processing.tokenizer import Tokenizer

SHIFT = 1 / 28  # of a side
STEPS = {  # number of views -> where each is shifted to, in units of SHIFT: x, y
    1: [(0, 0)],
    5: [(0, 0), (1, 1), (-1, -1), (-1, 1), (1, -1)],
    9: [(0, 0), *((x, y) for x in (-1, 0, 1) for y in (-1, 0, 1) if x or y)],
}


@dataclass(frozen=True)
class BoxOptions:
    """How the boxes of answers are made.

    Raises:
        ValueError: An option is out of range.
    """

    views: int = 1  # 1, 5 or 9 views of each image, whose boxes are fused
    # Drop boxes that overlap a better one of their label by more than this.
    nms: float | None = None
    # Tokens whose probabilities make the score of a box in one view (`parse_detections`).
    confidence: Literal["box", "label"] = "box"

    def __post_init__(self):
        if self.views not in STEPS:
            raise ValueError(f"views must be {', '.join(map(str, STEPS))}, got {self.views!r}")
        if self.nms is not None and not 0 <= self.nms <= 1:
            raise ValueError(f"nms must be an overlap from 0 to 1, got {self.nms!r}")
        if self.confidence not in ("box", "label"):
            raise ValueError(f"confidence must be box or label, got {self.confidence!r}")

    @property
    def changes(self) -> bool:
        """Whether answers are changed at all."""
        return self != BoxOptions()


def answer_with_boxes(
    model: PaliGemma,
    processor: Processor,
    prompts: list[EncodedPrompt],
    options: DecodingOptions,
    boxes: BoxOptions,
    seeds: Sequence[int] | None = None,
    batch_size: int = 16,
    progress: bool | None = None,
) -> Iterator[dict[int, Answer]]:
    """`answer_batches`, with boxes from several views or without duplicates.

    An answer has the text of the fused boxes. Its log-probabilities are such that each box gets its
    score when the answer is parsed. Answers that have no boxes in any view, or that are about
    several images, are those of the unchanged image.
    """
    if not boxes.changes:
        yield from answer_batches(model, processor, prompts, options, seeds, batch_size, progress)
        return
    checked = check_seeds(seeds, len(prompts))
    # The shifted images of a chunk are in memory at once.
    size = batch_size if boxes.views > 1 else max(1, len(prompts))
    for first in range(0, len(prompts), size):
        views, owners = _make_views(prompts[first : first + size], processor, boxes.views)
        batches = answer_batches(
            model,
            processor,
            views,
            options.for_rows(first + np.array(owners)),
            [int(checked[first + owner]) for owner in owners],
            batch_size,
            progress,
        )
        for groups in _complete_groups(batches, owners):
            yield {
                first + owner: fuse_answers(group, processor.tokenizer, processor.image_size, boxes)
                for owner, group in groups.items()
            }


def _complete_groups(
    batches: Iterable[dict[int, Answer]], owners: Sequence[int]
) -> Iterator[dict[int, list[Answer]]]:
    """The answers about the views of each prompt, in order, as soon as all of them are there.

    Args:
        batches: Answers by number of the view.
        owners: The prompt of each view.
    """
    counts, groups = Counter(owners), defaultdict(dict)
    for batch in batches:
        for view, answer in batch.items():
            groups[owners[view]][view] = answer
        touched = dict.fromkeys(owners[view] for view in batch)
        complete = [owner for owner in touched if len(groups[owner]) == counts[owner]]
        if complete:
            yield {
                owner: [answer for _, answer in sorted(groups.pop(owner).items())]
                for owner in complete
            }


def fuse_answers(
    answers: Sequence[Answer], tokenizer: Tokenizer, side: int, boxes: BoxOptions
) -> Answer:
    """One answer with the boxes of all views. The first answer is about the unchanged image."""
    first = answers[0]
    if first.error:
        return first
    size = side, side
    found = [
        parse_detections(list(answer.pieces(tokenizer)), size, boxes.confidence)
        for answer in answers
    ]
    if not any(found):
        return first
    moved = [
        _moved(detections, -x, -y, side)
        for detections, (x, y) in zip(found, _pixel_shifts(len(answers), side), strict=True)
    ]
    detections = fuse(moved) if len(moved) > 1 else moved[0]
    if boxes.nms is not None:
        detections = suppress(detections, boxes.nms)
    return _as_answer(detections, first, tokenizer, side)


def shifted(image: Image.Image, x: int, y: int) -> Image.Image:
    """The image moved to the right by x pixels and down by y. Edges are repeated."""
    pixels, margin = np.asarray(image), max(abs(x), abs(y))
    padded = np.pad(pixels, ((margin, margin), (margin, margin), (0, 0)), "edge")
    height, width = pixels.shape[:2]
    top, left = margin - y, margin - x
    return Image.fromarray(padded[top : top + height, left : left + width])


def _pixel_shifts(views: int, side: int) -> list[tuple[int, int]]:
    step = max(1, round(SHIFT * side))
    return [(x * step, y * step) for x, y in STEPS[views]]


def _make_views(
    prompts: Sequence[EncodedPrompt], processor: Processor, views: int
) -> tuple[list[EncodedPrompt], list[int]]:
    """All views, and for each the index of its prompt. The first view of a prompt is itself, the
    only one if it has not one image, or one that cannot be read."""
    made, owners = [], []
    for owner, prompt in enumerate(prompts):
        versions = [prompt]
        if views > 1 and len(prompt.images) == 1:
            side, settings = processor.image_size, processor.image_settings
            try:
                image = load_image(prompt.images[0], settings.on_white)
                square = to_square(image, side, settings)
            except ValueError:  # which the answer about the image itself reports
                shifts = []
            else:
                shifts = _pixel_shifts(views, side)[1:]
            versions += [replace(prompt, images=(shifted(square, x, y),)) for x, y in shifts]
        made += versions
        owners += [owner] * len(versions)
    return made, owners


def _moved(detections: Detections, x: int, y: int, side: int) -> Detections:
    """Detections moved back by a shift, clipped to the image; those outside it are dropped."""

    def move(detection: Detection) -> Detection:
        left, top, right, bottom = detection.box
        box = (left + x, top + y, right + x, bottom + y)
        left, top, right, bottom = (min(max(value, 0.0), float(side)) for value in box)
        return replace(detection, box=(left, top, right, bottom))

    moved = [move(detection) for detection in detections]
    kept = [d for d in moved if d.box[0] < d.box[2] and d.box[1] < d.box[3]]
    return Detections(kept, detections.skipped)


def _as_answer(detections: Detections, first: Answer, tokenizer: Tokenizer, side: int) -> Answer:
    """An answer whose tokens have, within each detection, its score as probability."""
    text = location_text(detections, (side, side))
    tokens = tokenizer.encode(text)
    ends = np.cumsum([len(location_text([d], (side, side))) + len(" ; ") for d in detections])
    scores = [score_of(detection) for detection in detections]
    plain = replace(first, text=text, tokens=tokens, log_probabilities=[0.0] * len(tokens))
    values, position = [], 0
    for piece, _ in plain.pieces(tokenizer):
        position += len(piece)
        owner = min(int(np.searchsorted(ends, position)), len(scores) - 1)
        values.append(math.log(max(scores[owner], 1e-30)))
    tokens, values = [*tokens, *first.tokens[-1:]], [*values, 0.0]  # with the end of the answer
    return Answer(text, tokens, values, sum(values))
