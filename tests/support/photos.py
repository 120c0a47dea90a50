"""The embedded photo of digits, and crops of it."""

from __future__ import annotations

from PIL import Image
from support.paths import DIGITS


def crops(count: int) -> list[Image.Image]:
    """Different crops of the photo, each a little smaller."""
    photo = Image.open(DIGITS)
    return [photo.crop((i, i // 2, 640 - 2 * i, 480 - i)) for i in range(count)]
