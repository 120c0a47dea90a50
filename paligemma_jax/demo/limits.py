"""What a visitor of the page may send: told in a sentence where it is too much, before anything is decoded or computed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from paligemma_jax.processing.image import load_image

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")  # none of them is a program, as EPS is


@dataclass(frozen=True)
class Limits:
    """What bounds one question."""

    megabytes: float = 10.0
    """The largest picture file."""
    megapixels: float = 50.0
    """The largest picture, decoded: a small file may hold a huge one."""
    images: int = 4
    """Pictures in one question."""
    characters: int = 1000
    """The longest prompt."""
    new_tokens: int = 512
    """The longest answer."""
    beams: int = 8
    """The widest beam."""

    def open(self, files: Sequence[str | None]) -> list[Image.Image]:
        """RGB pictures, turned upright, of the files that are there. ValueError names the one that is too large, or none."""
        files = [file for file in files if file]
        if not files:
            raise ValueError("There is no picture yet: drop, paste or take one, or try an example.")
        if len(files) > self.images:
            raise ValueError(f"{len(files)} pictures are too many: at most {self.images} go into one question.")
        return [self._open(Path(str(file))) for file in files]

    def prompt(self, text: str) -> str:
        """The text without spaces around it, if it may be asked."""
        text = (text or "").strip()
        if not text:
            raise ValueError("The prompt is empty: choose a task, or write one.")
        if len(text) > self.characters:
            raise ValueError(f"The prompt has {len(text)} characters: at most {self.characters} are taken.")
        if "<image>" in text:
            raise ValueError("<image> cannot be written here: the pictures go before the prompt by themselves.")
        return text

    def _open(self, file: Path) -> Image.Image:
        name = file.name
        if (size := os.path.getsize(file) / 1e6) > self.megabytes:
            raise ValueError(f"{name} has {size:.1f} MB: at most {self.megabytes:g} MB are taken.")
        try:
            with Image.open(file, formats=FORMATS) as image:  # its header only
                pixels = image.width * image.height / 1e6
        except Image.DecompressionBombError:
            raise ValueError(f"{name} has too many pixels: at most {self.megapixels:g} million are taken.") from None
        except Exception:
            raise ValueError(f"{name} is no picture that can be read here: take JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF.") from None
        if pixels > self.megapixels:
            raise ValueError(f"{name} has {pixels:.0f} megapixels: at most {self.megapixels:g} are taken.")
        try:
            return load_image(file)
        except ValueError:
            raise ValueError(f"{name} is damaged or cut off: it cannot be read to its end.") from None
