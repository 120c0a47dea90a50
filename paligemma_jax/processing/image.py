"""Images as RGB, and as the float pixels that the vision encoder reads.

Results equal those of transformers' PIL backend bit by bit.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from jaxtyping import Float32
from PIL import Image, ImageOps

from paligemma_jax.processing.encoded_image import check_encoded_image, decoding
from paligemma_jax.processing.image_array import SupportsArray, to_uint8
from paligemma_jax.processing.image_settings import ImageSettings

ImageSource = str | Path | bytes | dict | Image.Image | SupportsArray

SOURCES = 'a path, a PIL image, an array, encoded bytes or {"bytes": ..., "path": ...}'


def load_image(source: ImageSource, on_white: bool = True) -> Image.Image:
    """Load an RGB image.

    A source gives the same pixels as in transformers 5.23, where files and opened images differ:

    - A file is rotated by its EXIF orientation, and its alpha channel is dropped
      (transformers.image_utils.load_image). Encoded bytes are read like a file.
    - A PIL image or an array is not rotated, and is composited on white where it is transparent
      (image_transforms.convert_to_rgb).

    Other modes are converted with PIL's `convert("RGB")`. For 16-bit grayscale that makes every
    value above 255 white, so scale such images first. For an animation, the current (first) frame
    is used.

    Args:
        source: A path; a PIL image; an array of numpy, JAX or torch of shape [H, W], [H, W, 1], 3
            or 4, uint8 or float in [0, 1]; the bytes of an image file; or a dict {"bytes", "path"}
            of them, as in Hugging Face data sets that do not decode.
        on_white: Composite transparency on white (`do_convert_rgb` of transformers). Without, every
            color is kept as it is stored, and an alpha channel is dropped.

    Raises:
        ValueError: The source is not an image, or cannot be decoded completely or safely.
    """
    if isinstance(source, dict):
        source = _from_dict(source)
    if isinstance(source, bytes):
        name = f"the encoded image of {len(source)} bytes"
        return _to_rgb(_read(source, name), on_white, name)
    if isinstance(source, str | Path):
        name = str(source)
        # Unlike Path.is_file, False for a name that is too long, such as a prompt.
        if not os.path.isfile(source):
            raise ValueError(f"no image file at {name}: check the path, or download the URL")
        with decoding(name):
            content = Path(source).read_bytes()
        return _to_rgb(_read(content, name), on_white, name)
    if isinstance(source, Image.Image):
        return _to_rgb(source, on_white, getattr(source, "filename", "") or "the PIL image")
    if isinstance(source, SupportsArray):
        return _to_rgb(Image.fromarray(to_uint8(source)), on_white, "the array")
    raise ValueError(f"an image must be {SOURCES}, got {type(source).__name__}")


def pixel_values(
    images: Sequence[ImageSource], size: int, settings: ImageSettings = ImageSettings()
) -> Float32[np.ndarray, "M S S 3"]:
    """Resize images to squares of `size` pixels, and normalize them; by default to [-1, 1].

    The aspect ratio is not kept. Rounding is that of transformers (`rescale` and `normalize` in
    image_transforms): the product in float64, the rest in float32.

    Raises:
        ValueError: An image cannot be loaded, or has another size and `settings` do not resize.
    """
    squares = [to_square(load_image(image, settings.on_white), size, settings) for image in images]
    pixels = np.stack([np.asarray(square) for square in squares])
    if settings.rescale_factor is not None:
        pixels = pixels * np.float64(settings.rescale_factor)
    pixels = pixels.astype(np.float32)
    if settings.mean is not None:
        mean, std = np.array([settings.mean, settings.std], np.float32)
        pixels = (pixels - mean) / std
    return pixels


def to_square(image: Image.Image, size: int, settings: ImageSettings) -> Image.Image:
    """Resize to a square of `size` pixels, as before the normalization of `pixel_values`.

    Raises:
        ValueError: The image has another size and `settings` do not resize.
    """
    if settings.resize:
        return image.resize((size, size), Image.Resampling(settings.resample))
    if image.size != (size, size):
        raise ValueError(
            f"an image must have {size}x{size} pixels because do_resize is false in the "
            f"checkpoint's image processor, got {image.width}x{image.height}: resize it first"
        )
    return image


def _from_dict(source: dict) -> bytes | str:
    """The bytes of {"bytes", "path"}, or its path if there are none."""
    content, path = source.get("bytes"), source.get("path")
    if not set(source) <= {"bytes", "path"}:
        keys = ", ".join(map(repr, list(source)[:5]))
        raise ValueError(f"the keys of an image dict must be 'bytes' and 'path', got {keys}")
    if isinstance(content, bytes):
        return content
    if content is None and isinstance(path, str):
        return path
    raise ValueError(
        "an image dict must contain the file's content as bytes, or its path as a str, got "
        f"bytes: {type(content).__name__} and path: {type(path).__name__}"
    )


def _read(content: bytes, name: str) -> Image.Image:
    """Decode an image file as transformers does, with the transparent color of a PNG as `info`."""
    check_encoded_image(content, name)
    with decoding(name), Image.open(BytesIO(content)) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


def _to_rgb(image: Image.Image, on_white: bool, name: str) -> Image.Image:
    if 0 in image.size:
        raise ValueError(f"{name} is empty ({image.width}x{image.height} pixels)")
    with decoding(name):
        is_opaque = "A" not in image.getbands() and image.info.get("transparency") is None
        if is_opaque or not on_white:
            return image.convert("RGB")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
