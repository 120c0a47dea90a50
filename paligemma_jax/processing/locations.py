"""Boxes <-> the text that PaliGemma says of them, and drawing them.

One thing is `<loc0102><loc0204><loc0512><loc0307>`, then 16 `<segNNN>` if it has a mask, a space and its label; ` ; ` parts one from the next.
The numbers are y0 x0 y1 x1 in 1,023rds of the sides, as big_vision writes and reads them (pp/proj/paligemma/segmentation.py: round(1023 x);
evaluators/proj/paligemma/transfers/segmentation.py: n / 1023). Here a box is (left, top, right, bottom) in pixels, as Pillow has it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from paligemma_jax.processing.image import ImageSource, load_image
from paligemma_jax.processing.mask_codec import CODES, SIDE, VOCABULARY, MaskCodec

LAST_BIN = 1023  # the number of the last bin: the right or lower edge
Box = tuple[float, float, float, float]
Size = tuple[int, int]  # width, height in pixels, as Pillow has it

BOX = re.compile(r"(?:<loc\d{4}>){4}")
THING = re.compile(r"((?:<loc\d{4}>)+)\s*((?:<seg\d{3}>)*)([^;<]*)")
COLORS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#f032e6", "#9a6324", "#808000", "#000075")


@dataclass(frozen=True)
class Detection:
    """A thing that an answer points at."""

    label: str
    box: Box  # left, top, right, bottom in pixels of the original image
    score: float | None = None  # in 0..1: the geometric mean of the probabilities of the tokens of box and label; None where they are not known
    codes: tuple[int, ...] = ()  # the 16 of its mask, if it has one
    mask: np.ndarray | None = field(default=None, compare=False, repr=False)  # bool[H, W] of the original image


class Detections(list[Detection]):
    """In the order of the answer; `skipped` holds the parts of its text that say no box, or none that can be."""

    skipped: list[str]

    def __init__(self, found: Iterable[Detection] = (), skipped: Iterable[str] = ()):
        super().__init__(found)
        self.skipped = list(skipped)


def parse_detections(text: str | Sequence[tuple[str, float]], size: Size) -> Detections:
    """The things that an answer points at, in pixels of an image of `size`.

    text: or its tokens, each with its log-probability, from which the detections get their scores.
    Any text will do. Nothing is mended: a box without extent, of other than four numbers or of numbers beyond 1023 is skipped,
    and so are masks of other than 16 codes below 128, whose box stays.
    """
    tokens = [] if isinstance(text, str) else list(text)
    text = text if isinstance(text, str) else "".join(piece for piece, _ in tokens)
    ends = list(accumulate(len(piece) for piece, _ in tokens))
    found, skipped, at = [], [], 0
    for thing in THING.finditer(text):
        skipped.append(text[at : thing.start()])
        at = thing.end()
        box, codes = ([int(n) for n in re.findall(r"\d+", part)] for part in thing.groups()[:2])
        if len(box) != 4 or max(box) > LAST_BIN or box[0] >= box[2] or box[1] >= box[3]:
            skipped.append(thing[0])
            continue
        if codes and (len(codes) != CODES or max(codes) >= VOCABULARY):
            skipped.append(thing[2])
            codes = []
        last = thing.start() + len(thing[0].rstrip())
        its = [token for token, end in zip(tokens, ends) if token[0] and thing.start() < end and end - len(token[0]) < last]
        own = [value for piece, value in its if not piece.startswith("<seg")]  # many codes can draw much the same
        score = float(np.exp(np.mean(own))) if own else None
        found.append(Detection(thing[3].strip(), _pixels(box, size), score, tuple(codes)))
    skipped = [part.strip(" ;\n") for part in [*skipped, text[at:]]]
    return Detections(found, [part for part in skipped if part])


def location_text(things: Iterable[Detection], size: Size) -> str:
    """The text that says these: an answer to learn. A box thinner than a bin may be written as one without extent, which `parse` skips.

    ValueError for a box without extent or beyond the image, or a label that ; or < would end.
    """
    parts = []
    for thing in things:
        if re.search(r"[;<]", thing.label):
            raise ValueError(f"the label {thing.label!r} contains ; or <, which end a label: write it without")
        if thing.codes and (len(thing.codes) != CODES or not all(0 <= code < VOCABULARY for code in thing.codes)):
            raise ValueError(f"{thing.label}: {len(thing.codes)} codes of a mask: there are {CODES}, of 0 to {VOCABULARY - 1}")
        masked = "".join(f"<seg{code:03}>" for code in thing.codes)
        parts.append(f"{location_tokens(location_bins(thing.box, size))}{masked} {thing.label}".rstrip())
    return " ; ".join(parts)


def location_bins(box: Box, size: Size) -> list[float]:
    """A box in pixels as y0 x0 y1 x1 in bins, not yet rounded. ValueError if it has no extent, or is not on the image."""
    (left, top, right, bottom), (width, height) = box, size
    if not (0 <= left < right <= width and 0 <= top < bottom <= height):
        raise ValueError(f"box {tuple(box)} is none (left, top, right, bottom) on an image of {width} x {height} pixels: clip it, or leave it out")
    return [top / height * LAST_BIN, left / width * LAST_BIN, bottom / height * LAST_BIN, right / width * LAST_BIN]


def location_tokens(values: Iterable[float]) -> str:
    """Bins as text, each rounded and kept within 0 to 1023."""
    return "".join(f"<loc{min(max(round(value), 0), LAST_BIN):04}>" for value in values)


def _pixels(box: list[int], size: Size) -> Box:
    top, left, bottom, right = (n / LAST_BIN * side for n, side in zip(box, (size[1], size[0]) * 2))
    return left, top, right, bottom


def box_iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes, both (left, top, right, bottom) or both y before x."""
    sides = [max(0, min(a[i + 2], b[i + 2]) - max(a[i], b[i])) for i in (0, 1)]
    both = sides[0] * sides[1]
    area = lambda box: (box[2] - box[0]) * (box[3] - box[1])
    return both / max(area(a) + area(b) - both, 1e-9)


# Masks


def with_masks(things: Detections, size: Size, codec: MaskCodec) -> Detections:
    """The same things, those with codes with their masks, bool[H, W] of an image of `size`."""
    drawn = iter(codec.decode([thing.codes for thing in things if thing.codes])) if any(thing.codes for thing in things) else iter(())
    masked = [replace(thing, mask=paste(next(drawn), thing.box, size)) if thing.codes else thing for thing in things]
    return Detections(masked, things.skipped)


def paste(mask: np.ndarray, box: Box, size: Size) -> np.ndarray:
    """float32[64, 64] stretched over its box on an image of `size`, to the part of a pixel: bool[H, W], where it is above 0."""
    left, top, right, bottom = box
    x, y = SIDE / (right - left), SIDE / (bottom - top)
    image = Image.fromarray(np.asarray(mask, np.float32))
    placed = image.transform(size, Image.Transform.AFFINE, (x, 0, -left * x, 0, y, -top * y), Image.Resampling.BILINEAR, fillcolor=-1)
    return np.asarray(placed) > 0


# To look at


def draw(image: ImageSource, things: Iterable[Detection]) -> Image.Image:
    """A copy of the image with the boxes, their labels and scores, and the masks; each label has its colour."""
    things, picture = list(things), load_image(image).copy()
    labels = list(dict.fromkeys(thing.label for thing in things))
    color = lambda thing: COLORS[labels.index(thing.label) % len(COLORS)]
    for thing in things:
        if thing.mask is not None:
            picture.paste(Image.new("RGB", picture.size, color(thing)), mask=Image.fromarray(thing.mask.astype(np.uint8) * 115))
    pen, line = ImageDraw.Draw(picture), max(2, round(min(picture.size) / 200))
    font = ImageFont.load_default(max(10, min(picture.size) / 28))
    for thing in things:
        pen.rectangle(thing.box, outline=color(thing), width=line)
    for thing in things:  # above all boxes
        text = thing.label if thing.score is None else f"{thing.label} {thing.score:.2f}".strip()
        if text:
            _tag(pen, text, thing.box, color(thing), font, picture.size)
    return picture


def _tag(pen: ImageDraw.ImageDraw, text: str, box: Box, color: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, size: Size) -> None:
    """The label on its colour: above the box or, where there is no room, inside it; never off the picture."""
    left, top, right, bottom = pen.textbbox((0, 0), text, font)
    width, height = right - left + 6, bottom - top + 6
    x = max(min(box[0], size[0] - width), 0)
    y = box[1] - height if box[1] >= height else box[1]
    pen.rectangle((x, y, x + width, y + height), fill=color)
    pen.text((x + 3 - left, y + 3 - top), text, "white", font)
