"""Limits on what a visitor may send, checked before anything is decoded or computed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from paligemma_jax.processing.image import load_image
from paligemma_jax.serving.pictures import check_picture


@dataclass(frozen=True)
class Limits:
    """Limits on what a visitor may send, and on what is stored."""

    megabytes: float = 10.0
    """Maximum file size of a picture, in MB."""
    megapixels: float = 50.0
    """Maximum size of a decoded picture, in megapixels."""
    images: int = 4
    """Maximum number of pictures per prompt."""
    pages: int = 50
    """Maximum number of pictures to search."""
    characters: int = 1000
    """Maximum length of the prompt, in characters."""
    new_tokens: int = 512
    """Maximum length of the answer, in tokens."""
    beams: int = 8
    """Maximum number of beams."""
    visitor_megabytes: float = 100.0
    """Maximum size of the stored pictures of an address, in MB; the oldest are deleted."""
    total_megabytes: float = 1000.0
    """Maximum size of all stored pictures, in MB; the oldest are deleted."""

    def open_images(self, files: Sequence[str | None]) -> list[Image.Image]:
        """Return the pictures in RGB, rotated upright; None entries are skipped.

        Raises:
            ValueError: if there is no picture, or one exceeds a limit or cannot be decoded.
        """
        paths = [Path(file) for file in files if file]
        if not paths:
            raise ValueError("No picture yet. Upload, paste or take one, or try an example.")
        if len(paths) > self.images:
            raise ValueError(f"Too many pictures: got {len(paths)}, the limit is {self.images}.")
        return [self.open_image(path) for path in paths]

    def check_prompt(self, text: str) -> str:
        """Return the prompt without surrounding spaces, or raise ValueError."""
        text = (text or "").strip()
        if not text:
            raise ValueError("The prompt is empty. Choose a task or write a prompt.")
        if len(text) > self.characters:
            raise ValueError(
                f"The prompt must be at most {self.characters} characters, got {len(text)}."
            )
        if "<image>" in text:
            raise ValueError("Remove <image> from the prompt: pictures are inserted automatically.")
        return text

    def open_image(self, path: Path) -> Image.Image:
        """Return a picture as `open_images` does."""
        name = path.name
        if not path.is_file():
            raise ValueError(f"{name} is no longer stored. Upload it again.")
        megabytes = os.path.getsize(path) / 1e6
        if megabytes > self.megabytes:
            raise ValueError(
                f"{name} is too large: {megabytes:.1f} MB, the limit is {self.megabytes:g} MB."
            )
        check_picture(path.read_bytes(), name, self.megapixels)
        try:
            return load_image(path, on_white=False)  # the checkpoint's settings decide
        except ValueError:
            raise ValueError(f"{name} is damaged or incomplete.") from None
