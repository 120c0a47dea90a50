"""Read Pascal VOC's XML files, one for each image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from xml.etree import ElementTree

from msgspec import Struct

from convert.typed_json import check
from paligemma_jax.data.annotated import (
    AnnotatedImage,
    AnnotatedObject,
    annotation_files,
    read_text,
)


class VocBox(Struct):
    xmin: float
    ymin: float
    xmax: float
    ymax: float


class VocObject(Struct):
    name: str
    bndbox: VocBox


class VocSize(Struct, frozen=True):
    width: int = 0
    height: int = 0


class VocFile(Struct):
    filename: str
    object: list[VocObject] = []
    size: VocSize = VocSize()


def read(files: Sequence[Path], images: Path, masks: bool) -> Iterator[AnnotatedImage]:
    """Read VOC files. Their pixels are counted from 1, and the last belongs to the box (detectron2
    reads them alike).

    Raises:
        ValueError: A file is damaged, or masks are wanted, which VOC's XML does not have.
    """
    if masks:
        raise ValueError("--task segment requires masks, which Pascal VOC's XML files do not have")
    for file in annotation_files(files, ".xml"):
        content = check(_parse(file), VocFile, str(file), strict=False)
        size = (content.size.width, content.size.height)
        boxes = [(thing.name, thing.bndbox) for thing in content.object]
        objects = [
            AnnotatedObject(name, (box.xmin - 1, box.ymin - 1, box.xmax, box.ymax))
            for name, box in boxes
        ]
        yield AnnotatedImage(
            images / content.filename, size if min(size) > 0 else None, objects, source=str(file)
        )


def _parse(file: Path) -> dict[str, object]:
    """Return the elements by name. Declarations, which could define entities, are refused."""
    text = read_text(file)
    if "<!" in text.replace("<!--", ""):
        raise ValueError(f"{file} must not contain <!DOCTYPE or other declarations")
    try:
        root = ElementTree.fromstring(text)
    except (ElementTree.ParseError, ValueError) as error:
        raise ValueError(f"{file} is not XML ({error})") from None
    content: dict[str, object] = {child.tag: _leaves(child) for child in root}
    content["object"] = [
        {child.tag: _leaves(child) for child in element} for element in root.findall("object")
    ]
    return content


def _leaves(element: ElementTree.Element) -> object:
    """The text of an element, or the texts of its children."""
    if not len(element):
        return (element.text or "").strip()
    return {child.tag: (child.text or "").strip() for child in element}
