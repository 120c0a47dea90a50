"""Image files, PIL images and arrays -> RGB -> the SxS float pixels that the vision tower reads; bit-equal to transformers' PIL backend."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

ImageSource = str | Path | Image.Image | np.ndarray


def load_image(source: ImageSource) -> Image.Image:
    """RGB image of a file, a PIL image, or a uint8 array [H, W], [H, W, 1], [H, W, 3] or [H, W, 4].

    A source gives the pixels that transformers 5.23 gives for the same source, so files and open images differ in two ways:
      * a file is rotated as its EXIF orientation says, and its alpha channel is dropped (transformers.image_utils.load_image);
      * a PIL image or an array is taken as it lies, and is composited on white where it is transparent (image_transforms.convert_to_rgb).
    Other modes go through PIL's `convert("RGB")`, also 16-bit greyscale, of which that makes everything above 255 white: scale such images first.
    Of an animation the current (first) frame is taken.

    Raises:
      ValueError: no such file, not an image, a truncated or an oversized one, an array of another dtype or shape, or something else altogether.
    """
    if isinstance(source, np.ndarray):
        return _on_white(_from_array(source))
    if isinstance(source, Image.Image):
        return _decoded(lambda: _on_white(source), getattr(source, "filename", "") or "the PIL image")
    if isinstance(source, str | Path):
        if not os.path.isfile(source):  # unlike Path.is_file, False for a name that is too long (a prompt in the place of a path)
            raise ValueError(f"no image file at {source}: check the path (a URL has to be downloaded first)")
        return _decoded(lambda: _on_white(_open(source)), str(source))
    raise ValueError(f"an image is a path, a PIL image or a uint8 array, not {type(source).__name__}: convert it first")


def pixel_values(images: Sequence[ImageSource], size: int) -> np.ndarray:
    """float32 [M, size, size, 3] in [-1, 1]: each image squashed to a square with PIL's bicubic (NUMERICS 2.2), aspect ratio not kept.

    `x / 127.5 - 1` in float32 is the reference's rescale by 1/255 and normalisation by mean and deviation 0.5, to the bit.
    """
    squares = [load_image(image).resize((size, size), Image.Resampling.BICUBIC) for image in images]
    return np.stack([np.asarray(square, np.float32) for square in squares]) / np.float32(127.5) - np.float32(1)


def _open(path: str | Path) -> Image.Image:
    with Image.open(path) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return image.convert("RGB")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA")).convert("RGB")


def _from_array(array: np.ndarray) -> Image.Image:
    if array.dtype != np.uint8:
        raise ValueError(f"an image array is uint8 with values 0 to 255, not {array.dtype}: scale and cast it first")
    if array.ndim not in (2, 3) or array.shape[2:] not in ((), (1,), (3,), (4,)) or array.size == 0:
        raise ValueError(f"an image array is [H, W], [H, W, 1], [H, W, 3] or [H, W, 4], not {list(array.shape)}: pass one image, channels last")
    return Image.fromarray(array[..., 0] if array.shape[2:] == (1,) else array)


def _decoded(read, name: str) -> Image.Image:
    """read(), with whatever a decoder raises told as one ValueError: OSError, SyntaxError, EOFError, struct.error, ... by format."""
    try:
        image = read()
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} is too large to decode safely ({error}): shrink it, or raise PIL.Image.MAX_IMAGE_PIXELS") from error
    except Exception as error:
        raise ValueError(f"{name} is no image that PIL can read in full ({error}): check or convert the file") from error
    if 0 in image.size:
        raise ValueError(f"{name} is empty ({image.width}x{image.height} pixels): pass one with pixels")
    return image
