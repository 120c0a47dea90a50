"""What can go wrong with an encoded image: a check before decoding, and errors of decoders."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO

from PIL import Image, UnidentifiedImageError

# Each scan of a progressive JPEG passes over all pixels, though it may be of a few bytes: 1.3 ms
# per megapixel. Encoders write about 10; libtiff refuses more than this, too.
MAX_SCANS = 100

_END, _SCAN = 0xD9, 0xDA
_ALONE = {0x01, 0xD8}  # markers without a length: TEM, start of image
_MARKER = re.compile(rb"\xff+([\x01-\xcf\xd8-\xfe])")  # not a stuffed 0, nor a restart marker


def check_encoded_image(content: bytes, name: str = "the image") -> None:
    """Check that an image file decodes in reasonable time and memory, from its header and markers.

    Args:
        content: The bytes of the file.
        name: Its name in errors.

    Raises:
        ValueError: It is not an image, has more pixels than twice PIL.Image.MAX_IMAGE_PIXELS, or is
            a JPEG of more than `MAX_SCANS` scans.
    """
    with decoding(name), Image.open(BytesIO(content)) as image:
        is_jpeg = image.format in ("JPEG", "MPO")
    scans = count_scans(content) if is_jpeg else 0
    if scans > MAX_SCANS:
        raise ValueError(
            f"{name} must have at most {MAX_SCANS} scans to be decoded safely, got {scans}: "
            "save it again, as a plain JPEG"
        )


@contextmanager
def decoding(name: str) -> Iterator[None]:
    """Turn any exception of a decoder of PIL (OSError, SyntaxError, ...) into a ValueError."""
    try:
        yield
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"{name} is too large to decode safely ({error}): "
            "shrink it, or raise PIL.Image.MAX_IMAGE_PIXELS"
        ) from error
    except Exception as error:
        is_unknown = isinstance(error, UnidentifiedImageError)
        reason = "unknown format" if is_unknown else " ".join(str(error).split())
        raise ValueError(
            f"{name} is not an image, or PIL cannot read it completely ({reason}): "
            "check or convert the file"
        ) from error


def count_scans(jpeg: bytes) -> int:
    """Count the scans of a JPEG. Thumbnails in its metadata do not count."""
    scans = position = 0
    while True:
        marker = _MARKER.search(jpeg, position)
        if marker is None or marker[1][0] == _END:
            return scans
        position = marker.end()
        if marker[1][0] not in _ALONE:
            scans += marker[1][0] == _SCAN
            position += int.from_bytes(jpeg[position : position + 2], "big")
