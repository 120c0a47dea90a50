"""Convert annotated boxes and masks to rows that PaliGemma learns to detect and segment from.

A row has all objects of an image: `detect cat ; dog` as prefix, `<loc...> cat ; <loc...> dog` as
suffix, and for `evaluate` the boxes in pixels with their labels. The prefix names the labels of the
image, or the same labels in every row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from paligemma_jax.data import coco, labelme, voc, yolo
from paligemma_jax.data.annotated import AnnotatedImage, AnnotatedObject
from paligemma_jax.data.datasets import check_images, write_rows
from paligemma_jax.data.images import image_size
from paligemma_jax.data.jsonl import DataRow
from paligemma_jax.data.progress import progress_bar
from paligemma_jax.data.shapes import mask_box, rasterize
from paligemma_jax.processing.image import load_image
from paligemma_jax.processing.locations import (
    Box,
    Detection,
    Size,
    draw,
    location_bins,
    location_text,
    parse_detections,
    with_masks,
)
from paligemma_jax.processing.mask_codec import MaskCodec, crop_mask, load_codec

Task = Literal["detect", "segment"]
READERS: dict[str, Callable[[Sequence[Path], Path, bool], Iterator[AnnotatedImage]]] = {
    "coco": coco.read,
    "yolo": yolo.read,
    "voc": voc.read,
    "labelme": labelme.read,
}
SHOWN = 5  # rows in the picture
TILE = 448  # pixels of the longer side of an image in it


@dataclass(frozen=True)
class AnnotationResult:
    """What was written, and what was left out."""

    rows: int
    objects: int
    dropped: dict[str, int]  # objects, by reason
    empty_images: int  # images without objects, which get no row
    picture: Path


def convert(
    name: str,
    files: Sequence[str | Path],
    images: str | Path,
    output: str | Path,
    task: Task = "detect",
    codec: str | Path | None = None,
    labels: Sequence[str] = (),
) -> AnnotationResult:
    """Convert annotations to a JSONL file, and draw five of its rows as a PNG file beside it.

    Boxes are clipped to the image. Objects without area there, or thinner than one of the 1,024
    steps of `<loc>`, are dropped, and so are crowds. In labels, ";" becomes "," and "<" a space.

    Args:
        name: A key of READERS: the format.
        files: Files or directories of annotations.
        images: Directory of the images.
        output: The JSONL to write. Paths in it are relative to it.
        task: Whether rows ask for boxes or for masks.
        codec: File of the mask codec, to segment.
        labels: Every row asks for these, in this order. Other objects are dropped, and images
            without these labels get a row with an empty answer. By default a row asks for the
            labels of its objects, and images without objects get no row.

    Raises:
        ValueError: Annotations are damaged, images are missing or have another size, or there are
            no objects. Nothing is written then.
    """
    output = Path(output)
    if task == "segment" and not codec:
        raise ValueError("--task segment requires --codec, such as the published vae-oid.npz")
    mask_codec = load_codec(codec) if codec and task == "segment" else None
    annotated = list(READERS[name]([Path(file) for file in files], Path(images), task == "segment"))
    check_images(str(item.file) for item in annotated)
    dropped: Counter[str] = Counter()
    rows: list[DataRow] = []
    wanted = [_clean(label) for label in labels]
    for item in progress_bar(annotated, "annotations", unit="image", leave=False):
        detections = _detections(item, dropped, mask_codec, wanted)
        absent = wanted and not any(_clean(thing.label) in wanted for thing in item.objects)
        if detections or absent:
            rows.append(_row(item, detections, task, wanted))
    if not any(row.get("labels") for row in rows):
        reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
        raise ValueError(f"no objects in {len(annotated)} images ({reasons or 'none annotated'})")
    write_rows(output, rows)
    picture = output.with_suffix(".png")
    shown = [rows[i] for i in np.unique(np.linspace(0, len(rows) - 1, SHOWN).round().astype(int))]
    draw_rows(shown, mask_codec).save(picture)
    objects = sum(len(row.get("labels") or ()) for row in rows)
    return AnnotationResult(len(rows), objects, dict(dropped), len(annotated) - len(rows), picture)


def _row(
    item: AnnotatedImage, detections: Sequence[Detection], task: Task, wanted: Sequence[str]
) -> DataRow:
    size = image_size(item.file)
    labels = [detection.label for detection in detections]
    row: DataRow = {
        "image": str(item.file),
        "prefix": f"{task} {' ; '.join(wanted or dict.fromkeys(labels))}",
        "suffix": location_text(detections, size),
        "boxes": [detection.box for detection in detections],
        "labels": labels,
    }
    return row if item.id is None else {**row, "id": item.id}  # type: ignore[typeddict-unknown-key]


def _detections(
    item: AnnotatedImage, dropped: Counter[str], codec: MaskCodec | None, wanted: Sequence[str]
) -> list[Detection]:
    """The objects of an image that can be written; others are counted in `dropped`.

    Args:
        wanted: Labels to keep; none keeps all.
    """
    size = image_size(item.file)
    if item.size not in (None, size):
        raise ValueError(
            f"{item.file} has {size[0]} x {size[1]} pixels, but is annotated with "
            f"{item.size[0]} x {item.size[1]}: pass the images that were annotated, in the same "
            "rotation"
        )
    detections: list[Detection] = []
    crops: list[np.ndarray] = []
    for thing in item.objects:
        try:
            mask = None if codec is None or thing.shape is None else _mask(thing, size)
        except ValueError as error:
            raise ValueError(f"{item.source}: {error}") from None
        box = _clip(thing.box or (mask_box(mask) if mask is not None else (0, 0, 0, 0)), size)
        label = _clean(thing.label)
        other = "with other labels" if wanted and label not in wanted else ""
        problem = other or thing.problem or _problem(box, size)
        if codec is not None and not problem:
            problem = "without a mask" if mask is None or not mask.any() else ""
        if problem:
            dropped[problem] += 1
            continue
        detections.append(Detection(label, box))
        if mask is not None:
            crops.append(_crop(mask, box))
    if codec is None or not crops:
        return detections
    filled = [*crops, *[crops[0]] * (-len(crops) % 8)]  # so that few programs are compiled
    codes = codec.encode(np.stack(filled)).tolist()
    return [replace(x, codes=tuple(row)) for x, row in zip(detections, codes, strict=False)]


def _clean(label: str) -> str:
    """The label without characters that separate objects or start a location."""
    return " ".join(label.replace(";", ",").replace("<", " ").split())


def _mask(thing: AnnotatedObject, size: Size) -> np.ndarray:
    assert thing.shape is not None
    return np.asarray(rasterize(thing.shape, size)) > 0


def _crop(mask: np.ndarray, box: Box) -> np.ndarray:
    """The mask inside its box, whose corners are rounded to pixels as in big_vision."""
    left, top, right, bottom = (round(value) for value in box)
    return crop_mask(mask, (left, top, max(right, left + 1), max(bottom, top + 1)))


def _clip(box: Box, size: Size) -> Box:
    left, top, right, bottom = box
    return max(left, 0), max(top, 0), min(right, size[0]), min(bottom, size[1])


def _problem(box: Box, size: Size) -> str:
    """Why a clipped box cannot be written, if so."""
    left, top, right, bottom = box
    if left >= right or top >= bottom:
        return "without area in the image"
    bins = [round(value) for value in location_bins(box, size)]
    return "" if bins[0] < bins[2] and bins[1] < bins[3] else "thinner than a <loc> step"


def draw_rows(rows: Sequence[DataRow], codec: MaskCodec | None) -> Image.Image:
    """Draw what rows say: their images side by side, with the suffix drawn and the prefix below."""
    tiles = [_tile(row, codec) for row in rows]
    width, height = sum(tile.width for tile in tiles), max(tile.height for tile in tiles)
    picture, left = Image.new("RGB", (width, height), "white"), 0
    for tile in tiles:
        picture.paste(tile, (left, 0))
        left += tile.width
    return picture


def _tile(row: DataRow, codec: MaskCodec | None) -> Image.Image:
    image = load_image(str(row["image"]))
    image.thumbnail((TILE, TILE))
    detections = parse_detections(row.get("suffix") or "", image.size)
    if codec is not None:
        detections = with_masks(detections, image.size, codec)
    tile = Image.new("RGB", (TILE + 8, image.height + 32), "white")
    tile.paste(draw(image, detections), (4, 4))
    text = f"{Path(str(row['image'])).name}: {row.get('prefix')}"
    text = text if len(text) <= 60 else f"{text[:57]}..."
    ImageDraw.Draw(tile).text((6, image.height + 10), text, "black", ImageFont.load_default(14))
    return tile
