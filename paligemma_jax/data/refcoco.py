"""Convert RefCOCO, RefCOCO+ and RefCOCOg from their original files to rows.

Rows also have object (the id of the annotation), boxes, labels and, to segment, mask.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
from PIL import Image, ImageDraw

from paligemma_jax.data.jsonl import DataRow
from paligemma_jax.data.published import Published, PublishedFiles
from paligemma_jax.processing.locations import Box, Size, location_bins, location_tokens
from paligemma_jax.processing.mask_codec import MaskCodec, crop_mask


@dataclass(frozen=True)
class _Reference:
    """An expression and the object that it refers to."""

    row: DataRow
    expression: str
    object: int  # id of the annotation
    box: Box
    shape: Published  # COCO polygons or runs
    size: Size

    @property
    def box_tokens(self) -> str:
        return location_tokens(location_bins(self.box, self.size))


def refcoco_detect(source: PublishedFiles) -> Iterator[DataRow]:
    """refs(unc).p and instances.json, images in train2014; splits train, val, testA, testB.
    Answers are one box and the expression."""
    for reference in _references(source):
        suffix = f"{reference.box_tokens} {reference.expression}"
        yield {**reference.row, "suffix": suffix}


def refcoco_segment(source: PublishedFiles) -> Iterator[DataRow]:
    """refs(unc).p and instances.json, images in train2014; splits train, val, testA, testB.
    Masks are written as PNG beside the rows and, with a codec, encoded in the answers."""
    folder = source.output.with_name(f"{source.output.stem}-masks")
    suffixes: dict[int, str] = {}
    for reference in _references(source):
        file = folder / f"{reference.object}.png"
        if reference.object not in suffixes:
            folder.mkdir(parents=True, exist_ok=True)
            mask = rasterize(reference.shape, reference.size)
            mask.save(file)
            codes = _mask_tokens(np.asarray(mask), reference.box, source.codec)
            suffixes[reference.object] = reference.box_tokens + codes
        yield {**reference.row, "suffix": suffixes[reference.object], "mask": str(file)}


def _mask_tokens(mask: np.ndarray, box: Box, codec: MaskCodec | None) -> str:
    """Encode the mask inside its box, whose corners are rounded to pixels as in big_vision."""
    if codec is None:
        return ""
    left, top, right, bottom = (round(value) for value in box)
    crop = crop_mask(mask, (left, top, max(right, left + 1), max(bottom, top + 1)))
    return "".join(f"<seg{code:03}>" for code in codec.encode(crop[None])[0])


def _references(source: PublishedFiles) -> Iterator[_Reference]:
    path = next((path for path in source.files if path.suffix == ".p"), None)
    if path is None:
        raise ValueError("--files must include refs(...).p, which contains RefCOCO's expressions")
    images = {item["id"]: item for item in source.items("images")}
    annotations = {item["id"]: item for item in source.items("annotations")}
    for ref in read_pickle(path):
        if not source.includes(ref["split"]):
            continue
        annotation = annotations[ref["ann_id"]]
        number, image = annotation["id"], images[annotation["image_id"]]
        size = image["width"], image["height"]
        left, top, width, height = annotation["bbox"]
        right, bottom = min(left + width, size[0]), min(top + height, size[1])
        box = (max(left, 0), max(top, 0), right, bottom)
        for sentence in ref["sentences"]:
            text = sentence["sent"].replace(";", ",").replace("<", " ")
            fields = dict(id=sentence["sent_id"], object=number, boxes=[box], labels=[text])
            row = source.row(image["file_name"], text, (), **fields)
            yield _Reference(row, text, number, box, annotation["segmentation"], size)


class _DataUnpickler(pickle._Unpickler):
    """Unpickles only lists, dicts, strings and numbers. Without `find_class`, no code can run.

    The C implementation, `pickle.Unpickler`, would let a 20-byte file allocate a table of any size.
    """

    def find_class(self, module_name: str, global_name: str, /) -> NoReturn:
        raise pickle.UnpicklingError(f"it refers to {module_name}.{global_name}")


def read_pickle(path: Path) -> Published:
    """Read a pickle file that contains plain data.

    Raises:
        ValueError: The file is damaged, or refers to a class or function.
    """
    try:
        return _DataUnpickler(io.BytesIO(path.read_bytes())).load()
    except Exception as error:  # damaged files raise many types of exceptions
        raise ValueError(
            f"{path} is not a pickle file of plain data ({str(error) or type(error).__name__})"
        ) from None


def rasterize(shape: Published, size: Size) -> Image.Image:
    """Draw a COCO segmentation as an image of 0 and 255.

    Args:
        shape: Polygons [x, y, x, y, ...], or uncompressed run lengths in column order, starting
            with zeros.
        size: Width and height in pixels.
    """
    if isinstance(shape, dict):
        runs = enumerate(shape["counts"])
        pixels = b"".join((b"\xff" if number % 2 else b"\0") * run for number, run in runs)
        height, width = shape["size"]
        columns = Image.frombytes("L", (height, width), pixels)
        return columns.transpose(Image.Transpose.TRANSPOSE)
    fine = Image.new("L", (size[0] * 4, size[1] * 4))
    for polygon in shape:
        ImageDraw.Draw(fine).polygon([value * 4 for value in polygon], fill=255)
    return fine.reduce(4).point([0] * 128 + [255] * 128)
