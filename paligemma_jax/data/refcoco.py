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
from msgspec import Struct

from convert.typed_json import Positive, check
from paligemma_jax.data.jsonl import DataRow
from paligemma_jax.data.published import PublishedFiles
from paligemma_jax.data.shapes import Shape, rasterize
from paligemma_jax.processing.locations import Box, Size, location_bins, location_tokens
from paligemma_jax.processing.mask_codec import MaskCodec, crop_mask


@dataclass(frozen=True)
class _Reference:
    """An expression and the object that it refers to."""

    row: DataRow
    expression: str
    object: int  # id of the annotation
    box: Box
    shape: Shape
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


class RefSentence(Struct):
    sent: str
    sent_id: int


class Ref(Struct):
    """An object with the expressions that refer to it, of refs(...).p."""

    ann_id: int
    split: str
    sentences: list[RefSentence]


class RefImage(Struct, gc=False):
    id: int
    file_name: str
    width: Positive
    height: Positive


class RefAnnotation(Struct, gc=False):
    id: int
    image_id: int
    bbox: tuple[float, float, float, float]  # left, top, width, height
    segmentation: Shape


class RefInstances(Struct):
    images: list[RefImage]
    annotations: list[RefAnnotation]


def _references(source: PublishedFiles) -> Iterator[_Reference]:
    path = next((path for path in source.files if path.suffix == ".p"), None)
    if path is None:
        raise ValueError("--files must include refs(...).p, which contains RefCOCO's expressions")
    (file, instances), *_ = source.load(RefInstances)
    images = {item.id: item for item in instances.images}
    annotations = {item.id: item for item in instances.annotations}
    for ref in check(read_pickle(path), list[Ref], str(path)):
        if not source.includes(ref.split):
            continue
        annotation = annotations.get(ref.ann_id)
        image = images.get(annotation.image_id) if annotation else None
        if annotation is None or image is None:
            raise ValueError(f"{file} must have annotation {ref.ann_id} and its image")
        size = image.width, image.height
        left, top, width, height = annotation.bbox
        right, bottom = min(left + width, size[0]), min(top + height, size[1])
        box = (max(left, 0), max(top, 0), right, bottom)
        for sentence in ref.sentences:
            text = sentence.sent.replace(";", ",").replace("<", " ")
            fields = dict(id=sentence.sent_id, object=annotation.id, boxes=[box], labels=[text])
            row = source.row(image.file_name, text, (), **fields)
            yield _Reference(row, text, annotation.id, box, annotation.segmentation, size)


class _DataUnpickler(pickle._Unpickler):
    """Unpickles only lists, dicts, strings and numbers. Without `find_class`, no code can run.

    The C implementation, `pickle.Unpickler`, would let a 20-byte file allocate a table of any size.
    """

    def find_class(self, module_name: str, global_name: str, /) -> NoReturn:
        raise pickle.UnpicklingError(f"it refers to {module_name}.{global_name}")


def read_pickle(path: Path) -> object:
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
