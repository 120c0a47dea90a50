"""Outlines of objects, as annotation tools store them, to masks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np
from jaxtyping import Bool
from msgspec import Struct
from PIL import Image, ImageDraw

from convert.typed_json import Count, Positive
from paligemma_jax.processing.locations import Box, Size

MAX_COORDINATE = 1e6  # pixels; larger ones would overflow in Pillow


class Runs(Struct, gc=False):
    """A mask as the lengths of runs in column order, starting with zeros."""

    size: tuple[Positive, Positive]  # height, width
    counts: list[Count] | str  # compressed if a string


# polygons [x, y, x, y, ...], or a mask
Shape = list[list[float]] | Runs


def rasterize(shape: Shape, size: Size) -> Image.Image:
    """Draw a shape as an image of 0 and 255.

    Polygons are drawn at four times the size, and differ from pycocotools' by edge pixels.

    Args:
        shape: Polygons or runs.
        size: Width and height in pixels.

    Raises:
        ValueError: The runs do not fill the image, or a polygon is incomplete.
    """
    if isinstance(shape, Runs):
        return Image.fromarray(_from_runs(shape, size).astype(np.uint8) * 255)
    fine = Image.new("L", (size[0] * 4, size[1] * 4))
    for polygon in shape:
        if len(polygon) < 6 or len(polygon) % 2:
            raise ValueError(
                f"a polygon must have x and y of at least 3 points, got {len(polygon)} numbers"
            )
        farthest = max(polygon, key=abs)
        if abs(farthest) > MAX_COORDINATE:
            raise ValueError(f"a point must be near the image, in pixels, got {farthest:g}")
        ImageDraw.Draw(fine).polygon([value * 4 for value in polygon], fill=255)
    return fine.reduce(4).point([0] * 128 + [255] * 128)


def runs_of(mask: Bool[np.ndarray, "height width"]) -> Runs:
    """A mask as uncompressed runs."""
    pixels = mask.ravel(order="F")
    ends = [0, *(np.flatnonzero(np.diff(pixels)) + 1).tolist(), pixels.size]
    counts = [0] * int(pixels[0]) + np.diff(ends).tolist()
    return Runs((mask.shape[0], mask.shape[1]), counts)


def _from_runs(runs: Runs, size: Size) -> Bool[np.ndarray, "height width"]:
    height, width = runs.size
    if (width, height) != size:
        raise ValueError(f"a mask must have the size of its image, {size}, got {(width, height)}")
    counts = decompress(runs.counts) if isinstance(runs.counts, str) else runs.counts
    if min(counts, default=0) < 0 or sum(counts) != height * width:
        raise ValueError(
            f"the runs of a mask must fill its {height * width} pixels, got {sum(counts)}"
        )
    values = np.arange(len(counts)) % 2 == 1
    return np.repeat(values, counts).reshape(width, height).T


def decompress(text: str) -> list[int]:
    """Decode COCO's compressed runs, as pycocotools does (maskApi.c, rleFrString).

    A character has 5 bits of a number, lowest first, and a bit for "more follows". The last bit of
    a number is its sign. From the fourth run on, numbers are differences to the run two before.

    Raises:
        ValueError: The text has other characters, or ends within a number.
    """
    runs, value, shift = [], 0, 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 40:
            raise ValueError(f"compressed runs must be COCO's, got {text[:40]!r}")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    if shift:
        raise ValueError(f"compressed runs must be complete, got {text[-40:]!r} at the end")
    return runs


def polygon_box(polygons: Sequence[Sequence[float]]) -> Box:
    """Return left, top, right, bottom of the points of polygons."""
    x = list(chain.from_iterable(polygon[::2] for polygon in polygons))
    y = list(chain.from_iterable(polygon[1::2] for polygon in polygons))
    return min(x), min(y), max(x), max(y)


def mask_box(mask: Bool[np.ndarray, "height width"]) -> Box:
    """Return left, top, right, bottom of the pixels of a mask; zeros if it is empty."""
    columns, rows = (np.flatnonzero(mask.any(axis=axis)) for axis in (0, 1))
    if not len(rows):
        return 0.0, 0.0, 0.0, 0.0
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)
