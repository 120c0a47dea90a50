"""Boxes and masks in the text of answers: parse, write and draw them.

A detection is `<loc0102><loc0204><loc0512><loc0307>`, then 16 `<segNNN>` if it has a mask, a space
and its label; detections are separated by ` ; `. The numbers are y0 x0 y1 x1 in 1023rds of the
sides, as in big_vision (pp/proj/paligemma/segmentation.py: round(1023 x);
evaluators/proj/paligemma/transfers/segmentation.py: n / 1023). Boxes here are (left, top, right,
bottom) in pixels, as in Pillow.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Literal, Protocol

import numpy as np
from jaxtyping import Bool, Float32
from PIL import Image, ImageDraw, ImageFont

from paligemma_jax.processing.image import ImageSource, load_image
from paligemma_jax.processing.mask_codec import CODES, SIDE, VOCABULARY, MaskCodec

LAST_BIN = 1023  # the right or lower edge
Box = tuple[float, float, float, float]
Size = tuple[int, int]  # width, height in pixels, as in Pillow

BOX = re.compile(r"(?:<loc\d{4}>){4}")
DETECTION = re.compile(r"((?:<loc\d{4}>)+)\s*((?:<seg\d{3}>)*)([^;<]*)")
COLORS = (
    "#e6194b",
    "#3cb44b",
    "#4363d8",
    "#f58231",
    "#911eb4",
    "#008080",
    "#f032e6",
    "#9a6324",
    "#808000",
    "#000075",
)


@dataclass(frozen=True)
class Detection:
    """A detected object."""

    label: str
    box: Box  # left, top, right, bottom in pixels of the original image
    # Geometric mean of the probabilities of the tokens of box and label, if they are known.
    score: float | None = None
    codes: tuple[int, ...] = ()  # the 16 codes of its mask, if it has one
    mask: Bool[np.ndarray, "height width"] | None = field(default=None, compare=False, repr=False)


class Scored(Protocol):
    """A detection of any kind."""

    @property
    def score(self) -> float | None: ...


def score_of(detection: Scored) -> float:
    """The score to rank by: 1 for a detection without one."""
    return 1.0 if detection.score is None else detection.score


class Detections(list[Detection]):
    """Detections in the order of the answer. `skipped` has the parts that are not a valid box."""

    skipped: list[str]

    def __init__(self, detections: Iterable[Detection] = (), skipped: Iterable[str] = ()):
        super().__init__(detections)
        self.skipped = list(skipped)


def join_labels(label: str | Sequence[str]) -> str:
    """Join the labels of a prompt that detects or segments: "cat ; dog". ValueError if they are not
    text."""
    labels = [label] if isinstance(label, str) else label
    if not isinstance(labels, list | tuple) or {type(name) for name in labels} != {str}:
        raise ValueError(
            f"label must be a str, as in 'cat', or a list of them, got {reprlib.repr(label)}"
        )
    return " ; ".join(labels)


def parse_detections(
    text: str | Sequence[tuple[str, float]], size: Size, confidence: Literal["box", "label"] = "box"
) -> Detections:
    """Parse the detections in an answer. Any text is accepted.

    Nothing is repaired: a box is skipped unless it has an area and exactly four numbers up to 1023.
    A mask without exactly 16 codes below 128 is skipped too, but its box is kept.

    Args:
        text: The text, or its tokens with their log-probabilities, for detections with scores.
        size: Width and height of the image in pixels.
        confidence: Tokens whose probabilities make the score: those of box and label, or of the
            label alone, which is the confidence of a model that was trained with noise boxes.
    """
    tokens = [] if isinstance(text, str) else list(text)
    text = text if isinstance(text, str) else "".join(piece for piece, _ in tokens)
    detections, skipped, position = [], [], 0
    for match in DETECTION.finditer(text):
        skipped.append(text[position : match.start()])
        position = match.end()
        box, codes = ([int(n) for n in re.findall(r"\d+", match[i])] for i in (1, 2))
        if len(box) != 4 or max(box) > LAST_BIN or box[0] >= box[2] or box[1] >= box[3]:
            skipped.append(match[0])
            continue
        if codes and (len(codes) != CODES or max(codes) >= VOCABULARY):
            skipped.append(match[2])
            codes = []
        start = match.start(3) if confidence == "label" else match.start()
        score = _score(tokens, start, match.start() + len(match[0].rstrip()))
        detections.append(Detection(match[3].strip(), _pixels(box, size), score, tuple(codes)))
    skipped = [part.strip(" ;\n") for part in [*skipped, text[position:]]]
    return Detections(detections, [part for part in skipped if part])


def _score(tokens: Sequence[tuple[str, float]], start: int, end: int) -> float | None:
    """Geometric mean of the probabilities of tokens in text[start:end], without mask codes: many
    codes can draw nearly the same mask."""
    ends = accumulate(len(piece) for piece, _ in tokens)
    log_probabilities = [
        log_probability
        for (piece, log_probability), stop in zip(tokens, ends, strict=True)
        if piece and start < stop and stop - len(piece) < end and not piece.startswith("<seg")
    ]
    return float(np.exp(np.mean(log_probabilities))) if log_probabilities else None


def location_text(detections: Iterable[Detection], size: Size) -> str:
    """Write detections as the text of an answer: the inverse of `parse_detections`.

    A box thinner than a bin may lose its area in rounding, and is then skipped when parsed.

    Raises:
        ValueError: A box has no area or is not within the image, or a label contains ; or <.
    """
    parts = []
    for detection in detections:
        label, codes = detection.label, detection.codes
        if re.search(r"[;<]", label):
            raise ValueError(f"a label must not contain ; or <, got {label!r}")
        if codes and (len(codes) != CODES or not all(0 <= code < VOCABULARY for code in codes)):
            raise ValueError(
                f"a mask must have {CODES} codes from 0 to {VOCABULARY - 1}, "
                f"got {len(codes)} codes for {label!r}: {codes}"
            )
        mask = "".join(f"<seg{code:03}>" for code in codes)
        box = location_tokens(location_bins(detection.box, size))
        parts.append(f"{box}{mask} {label}".rstrip())
    return " ; ".join(parts)


def location_bins(box: Box, size: Size) -> list[float]:
    """Convert a box in pixels to y0 x0 y1 x1 in bins, not rounded yet.

    Raises:
        ValueError: The box has no area, or is not within the image.
    """
    (left, top, right, bottom), (width, height) = box, size
    if not (0 <= left < right <= width and 0 <= top < bottom <= height):
        raise ValueError(
            f"a box must be (left, top, right, bottom) on the image of {width} x {height} pixels, "
            f"got {tuple(box)}: clip or drop it"
        )
    fractions = top / height, left / width, bottom / height, right / width
    return [fraction * LAST_BIN for fraction in fractions]


def location_tokens(bins: Iterable[float]) -> str:
    """Write bins as `<locNNNN>` tokens, each rounded and clipped to 0 to 1023."""
    return "".join(f"<loc{min(max(round(value), 0), LAST_BIN):04}>" for value in bins)


def _pixels(bins: list[int], size: Size) -> Box:
    sides = (size[1], size[0]) * 2
    top, left, bottom, right = (n / LAST_BIN * side for n, side in zip(bins, sides, strict=True))
    return left, top, right, bottom


def box_iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes, both (left, top, right, bottom) or both y before x."""
    sides = [max(0, min(a[i + 2], b[i + 2]) - max(a[i], b[i])) for i in (0, 1)]
    intersection = sides[0] * sides[1]
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return intersection / max(sum(areas) - intersection, 1e-9)


def with_masks(detections: Detections, size: Size, codec: MaskCodec) -> Detections:
    """Return the detections, with masks bool[height, width] for those that have codes."""
    codes = [detection.codes for detection in detections if detection.codes]
    masks = iter(codec.decode(np.array(codes)) if codes else ())
    masked = [
        replace(detection, mask=paste(next(masks), detection.box, size))
        if detection.codes
        else detection
        for detection in detections
    ]
    return Detections(masked, detections.skipped)


def paste(
    mask: Float32[np.ndarray, "64 64"], box: Box, size: Size
) -> Bool[np.ndarray, "height width"]:
    """Stretch a decoded mask over its box, with subpixel accuracy; True where it is positive."""
    left, top, right, bottom = box
    x, y = SIDE / (right - left), SIDE / (bottom - top)
    affine = (x, 0, -left * x, 0, y, -top * y)
    image = Image.fromarray(np.asarray(mask, np.float32)).transform(
        size, Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR, fillcolor=-1
    )
    return np.asarray(image) > 0


def draw(image: ImageSource, detections: Iterable[Detection]) -> Image.Image:
    """Draw boxes, labels with scores, and masks on a copy of the image, in one color per label."""
    detections, picture = list(detections), load_image(image).copy()
    labels = list(dict.fromkeys(detection.label for detection in detections))
    colors = {label: COLORS[i % len(COLORS)] for i, label in enumerate(labels)}
    for detection in detections:
        if detection.mask is not None:
            color = Image.new("RGB", picture.size, colors[detection.label])
            picture.paste(color, mask=Image.fromarray(detection.mask.astype(np.uint8) * 115))
    pen, width = ImageDraw.Draw(picture), max(2, round(min(picture.size) / 200))
    font = ImageFont.load_default(max(10, min(picture.size) / 28))
    for detection in detections:
        pen.rectangle(detection.box, outline=colors[detection.label], width=width)
    for detection in detections:  # above all boxes
        score = "" if detection.score is None else f"{detection.score:.2f}"
        text = f"{detection.label} {score}".strip()
        if text:
            _draw_label(pen, text, detection.box, colors[detection.label], font, picture.size)
    return picture


def _draw_label(
    pen: ImageDraw.ImageDraw,
    text: str,
    box: Box,
    color: str,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    size: Size,
) -> None:
    """Draw a label above the box or, where there is no space, inside it; always on the picture."""
    left, top, right, bottom = pen.textbbox((0, 0), text, font)
    width, height = right - left + 6, bottom - top + 6
    x = max(min(box[0], size[0] - width), 0)
    y = box[1] - height if box[1] >= height else box[1]
    pen.rectangle((x, y, x + width, y + height), fill=color)
    pen.text((x + 3 - left, y + 3 - top), text, "white", font)
