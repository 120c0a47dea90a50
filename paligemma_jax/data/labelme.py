"""Read LabelMe's JSON files, one for each image."""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Iterator, Sequence
from io import BytesIO
from itertools import chain
from pathlib import Path, PureWindowsPath

import numpy as np
from msgspec import Struct
from PIL import Image

from convert.typed_json import Positive, load_json
from paligemma_jax.data.annotated import AnnotatedImage, AnnotatedObject, annotation_files
from paligemma_jax.data.shapes import polygon_box, runs_of
from paligemma_jax.processing.locations import Size

CIRCLE = 64  # points of a circle's polygon
IMAGE_LIMIT = 2**28  # bytes of a file, which may contain the image


class LabelMeShape(Struct):
    label: str
    points: list[tuple[float, float]]
    shape_type: str | None = "polygon"
    mask: str | None = None  # base64 of a PNG that fills the box of the two points


class LabelMeFile(Struct):
    shapes: list[LabelMeShape]
    imagePath: str
    imageWidth: Positive | None = None
    imageHeight: Positive | None = None


def read(files: Sequence[Path], images: Path, masks: bool) -> Iterator[AnnotatedImage]:
    """Read LabelMe files. Points and lines have no area and are dropped.

    Raises:
        ValueError: A file is damaged.
    """
    for file in annotation_files(files, ".json"):
        content = load_json(file, LabelMeFile, IMAGE_LIMIT)
        # The path is relative to the file, and may be one of Windows.
        image = images / PureWindowsPath(content.imagePath).name
        width, height = content.imageWidth, content.imageHeight
        size = (width, height) if width and height else None
        objects = [_object(shape, size, masks, str(file)) for shape in content.shapes]
        yield AnnotatedImage(image, size, objects, source=str(file))


def _object(shape: LabelMeShape, size: Size | None, masks: bool, source: str) -> AnnotatedObject:
    polygon = _polygon(shape)
    if polygon is None:
        return AnnotatedObject(shape.label, problem="that are points or lines")
    box = polygon_box([polygon])
    if shape.mask is None or not masks:
        return AnnotatedObject(shape.label, box, [polygon])
    if size is None:
        raise ValueError(f"{source} must have imageWidth and imageHeight, to place its masks")
    try:
        png = Image.open(BytesIO(base64.b64decode(shape.mask, validate=True)), formats=["PNG"])
        mask = Image.new("1", size)
        mask.paste(png.convert("1"), (round(box[0]), round(box[1])))
    except (binascii.Error, OSError, ValueError, SyntaxError) as error:
        raise ValueError(f"{source}: mask must be a PNG file in base64 ({error})") from None
    return AnnotatedObject(shape.label, box, runs_of(np.asarray(mask)))


def _polygon(shape: LabelMeShape) -> list[float] | None:
    """The outline of a shape; None if it has no area."""
    points, kind = shape.points, shape.shape_type or "polygon"
    if kind == "circle" and len(points) == 2:  # the center and a point of the circle
        (x, y), edge = points
        radius = math.dist((x, y), edge)
        angles = np.arange(CIRCLE) * 2 * np.pi / CIRCLE
        points = list(zip(x + radius * np.cos(angles), y + radius * np.sin(angles), strict=True))
    elif kind in ("rectangle", "mask") and len(points) == 2:
        (x0, y0), (x1, y1) = points
        points = [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]
    elif kind not in ("polygon", "rectangle", "mask") or len(points) < 3:
        return None
    return [float(value) for value in chain.from_iterable(points)]
