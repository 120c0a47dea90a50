"""Read YOLO's text files, one for each image: a class and a box or a polygon in each line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml
from msgspec import Struct

from convert.typed_json import check
from paligemma_jax.data.annotated import (
    AnnotatedImage,
    AnnotatedObject,
    annotation_files,
    read_text,
)
from paligemma_jax.data.images import image_size
from paligemma_jax.data.shapes import polygon_box
from paligemma_jax.processing.locations import Size

IMAGES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}
NAMES = {".yaml", ".yml", ".txt"}
NO_NAMES = "--files must include data.yaml or classes.txt, which have the names of the classes"


class YoloData(Struct):
    """data.yaml."""

    names: list[str] | dict[int, str]


def read(files: Sequence[Path], images: Path, masks: bool) -> Iterator[AnnotatedImage]:
    """Read YOLO files: directories of labels, and the names of the classes.

    Raises:
        ValueError: A file is damaged, an image is missing, or there are no names.
    """
    names = _names(files)
    by_stem = {
        path.relative_to(images).with_suffix(""): path
        for path in sorted(images.rglob("*"))
        if path.suffix.lower() in IMAGES
    }
    for folder in (path for path in files if path.is_dir()):
        for file in annotation_files([folder], ".txt"):
            if file.name == "classes.txt":
                continue
            stem = file.relative_to(folder).with_suffix("")
            image = by_stem.get(stem, images / f"{stem}.jpg")
            size = image_size(image)
            lines = enumerate(read_text(file).splitlines(), 1)
            objects = [
                _object(line.split(), names, size, masks, f"{file}: line {number}")
                for number, line in lines
                if line.strip()
            ]
            yield AnnotatedImage(image, size, objects, source=str(file))


def _names(files: Sequence[Path]) -> dict[int, str]:
    candidates = [path for path in files if path.is_file() and path.suffix in NAMES]
    candidates += [path / "classes.txt" for path in files if (path / "classes.txt").is_file()]
    if not candidates:
        raise ValueError(NO_NAMES)
    file = candidates[0]
    text = read_text(file)
    if file.suffix == ".txt":
        return dict(enumerate(line.strip() for line in text.splitlines() if line.strip()))
    try:
        content = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not YAML ({' '.join(str(error).split())[:200]})") from None
    names = check(content, YoloData, str(file)).names
    return names if isinstance(names, dict) else dict(enumerate(names))


def _object(
    words: list[str], names: dict[int, str], size: Size, masks: bool, source: str
) -> AnnotatedObject:
    """An object of a line: class, then x y width height of a box, or x y x y ... of a polygon, all
    as fractions of the image."""
    try:
        number, values = int(words[0]), [float(word) for word in words[1:]]
    except ValueError:
        raise ValueError(f"{source} must be numbers, got {' '.join(words)[:60]!r}") from None
    if number not in names:
        raise ValueError(f"{source}: class must be one of the {len(names)} names, got {number}")
    is_box, is_polygon = len(values) == 4, len(values) >= 6 and len(values) % 2 == 0
    if not (is_box or is_polygon) or not all(abs(value) < 1e6 for value in values):
        raise ValueError(
            f"{source} must be a class and x y width height, or x y of at least 3 points, got "
            f"{' '.join(words)[:60]!r}"
        )
    pixels = [value * size[i % 2] for i, value in enumerate(values)]
    if is_polygon:
        return AnnotatedObject(names[number], polygon_box([pixels]), [pixels])
    x, y, width, height = pixels
    return AnnotatedObject(
        names[number], (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
    )
