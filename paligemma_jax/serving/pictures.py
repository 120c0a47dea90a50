"""The pictures of a request: data URLs, and files of other servers if they are allowed."""

from __future__ import annotations

import binascii
import re
from io import BytesIO

from PIL import Image

from paligemma_jax.processing.encoded_image import check_encoded_image
from paligemma_jax.serving.download import download
from paligemma_jax.serving.limits import PictureLimits

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")  # not EPS, which is a program
NAMES = "JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF"
DATA_URL = re.compile(r"data:[\w.+/-]*(?:;[\w.=+-]+)*;base64,", re.IGNORECASE)


def open_picture(url: str, name: str, limits: PictureLimits, allow_urls: bool = False) -> bytes:
    """The bytes of an image file. Only its header is decoded here.

    Args:
        url: A data URL, or an http URL.
        name: Its name in errors.
        allow_urls: Whether to fetch http URLs.

    Raises:
        ValueError: It is not a picture within the limits, or cannot be fetched.
    """
    limit = int(limits.megabytes * 1e6)
    if url[:5].lower() == "data:":
        content = _decode(url, name, limit)
    elif url[:5].lower() != "http:" and url[:6].lower() != "https:":
        raise ValueError(f"{name} must be a data: URL of a picture, got {url[:40]!r}")
    elif not allow_urls:
        raise ValueError(
            f"{name} must be a data: URL, because this server was started without --allow-urls, "
            f"got {url[:100]!r}"
        )
    else:
        content = download(url, limit, limits.fetch_seconds)
    check_picture(content, name, limits.megapixels)
    return content


def check_picture(content: bytes, name: str, megapixels: float) -> None:
    """Check the header of an image file, before anything is decoded.

    Args:
        content: The bytes of the file.
        name: Its name in errors.
        megapixels: Maximum size of the decoded picture.

    Raises:
        ValueError: It is not a picture of the `FORMATS`, or takes too much memory or time to
            decode.
    """
    if not content:
        raise ValueError(f"{name} must be a picture, got no bytes")
    try:
        with Image.open(BytesIO(content), formats=FORMATS) as image:
            size = image.width * image.height / 1e6
    except Image.DecompressionBombError:
        largest = 2e-6 * (Image.MAX_IMAGE_PIXELS or 0)  # PIL opens no larger ones
        limit = min(megapixels, largest)
        raise ValueError(
            f"{name} must have at most {limit:g} megapixels, got more than {largest:g}"
        ) from None
    except Exception:  # of PIL's decoders: OSError, SyntaxError, struct.error, ...
        raise ValueError(
            f"{name} must be a {NAMES} file, got {len(content)} bytes of something else"
        ) from None
    if size > megapixels:
        raise ValueError(f"{name} must have at most {megapixels:g} megapixels, got {size:.1f}")
    check_encoded_image(content, name)


def _decode(url: str, name: str, limit: int) -> bytes:
    match = DATA_URL.match(url)
    if match is None:
        raise ValueError(f"{name} must be a URL like data:image/jpeg;base64,..., got {url[:40]!r}")
    text = url[match.end() :]
    if len(text) * 3 // 4 > limit + 3:
        raise ValueError(
            f"{name} must be at most {limit / 1e6:g} MB, got {len(text) * 0.75e-6:.1f} MB"
        )
    try:
        return binascii.a2b_base64("".join(text.split()), strict_mode=True)
    except ValueError as error:
        raise ValueError(f"{name} must be valid base64: {str(error).lower()}") from None
