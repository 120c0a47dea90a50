"""The images of rows: whether they can be read, and their size."""

from __future__ import annotations

from pathlib import Path

from PIL import ExifTags, Image

from paligemma_jax.processing.image import ImageSource, load_image

SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap width and height


def image_size(source: ImageSource) -> tuple[int, int]:
    """Return width and height of `load_image(source)`. Of a file, only the header is read.

    Raises:
        ValueError: The source is not an image.
    """
    if not isinstance(source, str | Path):
        return load_image(source).size
    try:
        with Image.open(source) as image:
            sideways = image.getexif().get(ExifTags.Base.Orientation) in SIDEWAYS
            return (image.height, image.width) if sideways else image.size
    except Exception as error:  # Pillow's decoders raise many types of exceptions
        raise ValueError(image_problem(source, error)) from None


def image_error(path: ImageSource) -> str | None:
    """Decode an image; return why it cannot be read."""
    try:
        with Image.open(path) as image:  # type: ignore[arg-type]
            image.draft("RGB", (1, 1))  # a JPEG at its coarsest scale: a third of the time
            image.load()
    except Exception as error:  # Pillow's decoders raise many types of exceptions
        return image_problem(path, error)
    return None


def image_problem(path: ImageSource, error: Exception) -> str:
    """Describe why an image cannot be read."""
    if isinstance(error, FileNotFoundError):
        return f"no such image: {path}"
    return f"{path} is not a readable image ({error})"
