"""Images as RGB, and as the float pixels that the vision encoder reads.

Results equal those of transformers' PIL backend bit by bit.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float32
from PIL import Image, ImageOps

ImageSource = str | Path | Image.Image | np.ndarray


def load_image(source: ImageSource) -> Image.Image:
    """Load an RGB image from a file, a PIL image, or a uint8[H, W], [H, W, 1], 3 or 4 array.

    A source gives the same pixels as in transformers 5.23, where files and opened images differ:

    - A file is rotated by its EXIF orientation, and its alpha channel is dropped
      (transformers.image_utils.load_image).
    - A PIL image or an array is not rotated, and is composited on white where it is transparent
      (image_transforms.convert_to_rgb).

    Other modes are converted with PIL's `convert("RGB")`. For 16-bit grayscale that makes every
    value above 255 white, so scale such images first. For an animation, the current (first) frame
    is used.

    Raises:
        ValueError: The source is not an image, or cannot be decoded completely.
    """
    if isinstance(source, np.ndarray):
        return _composite_on_white(_from_array(source))
    if isinstance(source, Image.Image):
        name = getattr(source, "filename", "") or "the PIL image"
        return _decode(lambda: _composite_on_white(source), name)
    if isinstance(source, str | Path):
        # Unlike Path.is_file, False for a name that is too long, such as a prompt.
        if not os.path.isfile(source):
            raise ValueError(f"no image file at {source}: check the path, or download the URL")
        return _decode(lambda: _composite_on_white(_open(source)), str(source))
    kind = type(source).__name__
    raise ValueError(f"an image must be a path, a PIL image or a uint8 array, got {kind}")


def pixel_values(images: Sequence[ImageSource], size: int) -> Float32[np.ndarray, "M S S 3"]:
    """Resize images to squares of `size` pixels, with values in [-1, 1].

    Uses PIL's bicubic filter, and does not keep the aspect ratio. `x / 127.5 - 1` in float32 equals
    the reference's rescaling by 1/255 and normalization with mean and deviation 0.5 bit by bit.
    """
    bicubic = Image.Resampling.BICUBIC
    squares = [load_image(image).resize((size, size), bicubic) for image in images]
    pixels = np.stack([np.asarray(square, np.float32) for square in squares])
    return pixels / np.float32(127.5) - np.float32(1)


def _open(path: str | Path) -> Image.Image:
    with Image.open(path) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


def _composite_on_white(image: Image.Image) -> Image.Image:
    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return image.convert("RGB")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def _from_array(array: np.ndarray) -> Image.Image:
    if array.dtype != np.uint8:
        raise ValueError(
            f"an image array must be uint8 (0 to 255), got {array.dtype}: scale and cast it first"
        )
    channels = array.shape[2:]
    if array.ndim not in (2, 3) or channels not in ((), (1,), (3,), (4,)) or array.size == 0:
        raise ValueError(
            "an image array must be [H, W], [H, W, 1], [H, W, 3] or [H, W, 4], "
            f"got {list(array.shape)}: pass one image, channels last"
        )
    return Image.fromarray(array[..., 0] if channels == (1,) else array)


def _decode(read: Callable[[], Image.Image], name: str) -> Image.Image:
    """Return read(), with any exception of a decoder (OSError, SyntaxError, ...) as a
    ValueError."""
    try:
        image = read()
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"{name} is too large to decode safely ({error}): "
            "shrink it, or raise PIL.Image.MAX_IMAGE_PIXELS"
        ) from error
    except Exception as error:
        raise ValueError(
            f"{name} is not an image, or PIL cannot read it completely ({error}): "
            "check or convert the file"
        ) from error
    if 0 in image.size:
        raise ValueError(f"{name} is empty ({image.width}x{image.height} pixels)")
    return image
