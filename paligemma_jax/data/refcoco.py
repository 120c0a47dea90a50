"""RefCOCO, RefCOCO+ and RefCOCOg as they are published -> our rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from paligemma_jax.data import pickled
from paligemma_jax.data.published import JsonRow, PublishedFiles, make_row
from paligemma_jax.processing.locations import location_bins, location_tokens
from paligemma_jax.processing.mask_codec import MaskCodec, crop_mask


def refcoco_detect(given: PublishedFiles) -> Iterator[JsonRow]:
    """refs(unc).p and instances.json, pictures in train2014; splits train, val, testA, testB. Answers are one box and the expression."""
    for row, _, size in _references(given):
        yield row | {"suffix": f"{location_tokens(location_bins(row['boxes'][0], size))} {row['labels'][0]}"}


def refcoco_segment(given: PublishedFiles) -> Iterator[JsonRow]:
    """The same files; masks as PNG beside the rows and, with a codec, in the answers too."""
    folder = given.output.with_name(f"{given.output.stem}-masks")
    said: dict[int, str] = {}
    for row, shape, size in _references(given):
        file = folder / f"{row['object']}.png"
        if row["object"] not in said:
            folder.mkdir(parents=True, exist_ok=True)
            mask = rasterize(shape, size)
            mask.save(file)
            said[row["object"]] = location_tokens(location_bins(row["boxes"][0], size)) + _codes(np.asarray(mask), row["boxes"][0], given.codec)
        yield row | {"suffix": said[row["object"]], "mask": str(file)}


def _codes(mask: np.ndarray, box: Sequence[float], codec: MaskCodec | None) -> str:
    """What of the mask lies in its box, its corners rounded to pixels as big_vision does it."""
    if codec is None:
        return ""
    left, top, right, bottom = (round(value) for value in box)
    part = crop_mask(mask, (left, top, max(right, left + 1), max(bottom, top + 1)))
    return "".join(f"<seg{code:03}>" for code in codec.encode(part[None])[0])


def _references(given: PublishedFiles) -> Iterator[tuple[JsonRow, Any, tuple[int, int]]]:
    """For each expression its row, the shape that is meant (polygons, or runs of pixels), and width and height of the picture."""
    path = next((path for path in given.files if path.suffix == ".p"), None)
    if path is None:
        raise ValueError("no refs(...).p among the files: RefCOCO's expressions are in it")
    pictures = {item["id"]: item for item in given.part("images")}
    objects = {item["id"]: item for item in given.part("annotations")}
    for ref in pickled.read(path.read_bytes()):
        if given.wants(ref["split"]):
            thing = objects[ref["ann_id"]]
            picture = pictures[thing["image_id"]]
            left, top, width, height = thing["bbox"]
            for sentence in ref["sentences"]:
                words = sentence["sent"].replace(";", ",").replace("<", " ")
                box = (max(left, 0), max(top, 0), min(left + width, picture["width"]), min(top + height, picture["height"]))
                row = make_row(given, picture["file_name"], words, (), id=sentence["sent_id"], object=thing["id"], boxes=[box], labels=[words])
                yield row, thing["segmentation"], (picture["width"], picture["height"])


def rasterize(shape: Any, size: tuple[int, int]) -> Image.Image:
    """COCO's polygons [x, y, x, y, ...], or its uncompressed runs of pixels (down the columns, off first), as a picture of 0 and 255."""
    if isinstance(shape, dict):
        flat = b"".join((b"\xff" if number % 2 else b"\0") * run for number, run in enumerate(shape["counts"]))
        height, width = shape["size"]
        return Image.frombytes("L", (height, width), flat).transpose(Image.Transpose.TRANSPOSE)
    fine = Image.new("L", (size[0] * 4, size[1] * 4))
    for polygon in shape:
        ImageDraw.Draw(fine).polygon([value * 4 for value in polygon], fill=255)
    return fine.reduce(4).point([0] * 128 + [255] * 128)
