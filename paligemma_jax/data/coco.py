"""Read COCO's instances_*.json."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from msgspec import Struct

from convert.typed_json import Positive, load_json
from paligemma_jax.data.annotated import (
    DATA_LIMIT,
    AnnotatedImage,
    AnnotatedObject,
    annotation_files,
)
from paligemma_jax.data.shapes import Shape, polygon_box
from paligemma_jax.processing.locations import Box


class CocoImage(Struct, gc=False):
    id: int | str
    file_name: str
    width: Positive
    height: Positive


class CocoCategory(Struct):
    id: int
    name: str


class CocoAnnotation(Struct, gc=False):
    image_id: int | str
    category_id: int
    bbox: tuple[float, float, float, float] | None = None  # left, top, width, height
    iscrowd: int | bool | None = 0


class CocoMask(CocoAnnotation, gc=False):
    segmentation: Shape | None = None


class CocoBoxes(Struct):
    images: list[CocoImage]
    annotations: list[CocoAnnotation]
    categories: list[CocoCategory]


class CocoMasks(Struct):
    images: list[CocoImage]
    annotations: list[CocoMask]
    categories: list[CocoCategory]


def read(files: Sequence[Path], images: Path, masks: bool) -> Iterator[AnnotatedImage]:
    """Read the images of COCO files, in their order. Without `masks`, segmentations are skipped,
    which takes a fraction of the time and memory.

    Raises:
        ValueError: A file is damaged, or refers to an image or category that it does not have.
    """
    for file in annotation_files(files, ".json"):
        content = load_json(file, CocoMasks if masks else CocoBoxes, DATA_LIMIT)
        labels = {category.id: category.name for category in content.categories}
        found = {
            image.id: AnnotatedImage(
                images / image.file_name, (image.width, image.height), [], image.id, str(file)
            )
            for image in content.images
        }
        for i, annotation in enumerate(content.annotations):
            if annotation.image_id not in found or annotation.category_id not in labels:
                raise ValueError(
                    f"{file}: annotations[{i}] must refer to an image and a category of the file, "
                    f"got image_id {annotation.image_id} and category_id {annotation.category_id}"
                )
            label = labels[annotation.category_id]
            found[annotation.image_id].objects.append(_object(label, annotation))
        yield from found.values()


def _object(label: str, annotation: CocoAnnotation | CocoMask) -> AnnotatedObject:
    shape = annotation.segmentation or None if isinstance(annotation, CocoMask) else None
    box: Box | None = None
    if annotation.bbox is not None:
        left, top, width, height = annotation.bbox
        box = (left, top, left + width, top + height)
    elif isinstance(shape, list):
        box = polygon_box(shape)
    return AnnotatedObject(label, box, shape, "that are crowds" if annotation.iscrowd else "")
